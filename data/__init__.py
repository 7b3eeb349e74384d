"""npdrt.data: data sets as host arrays, their downloads, the order of their batches, and the
augmentation of images.

`load(name)` returns a `Dataset`. Where to look:

    load         which module reads which name
    dataset      the type of every data set
    expected     what a run's model expects of new data
    npz, idx, cifar, folder, text, squad
                 the readers, one for each form of files
    sample       made-up text and questions, without files
    sample_images
                 a made-up folder in the layout of ImageNet
    raw, scale   from arrays of a file to a Dataset: checks, standardisation
    images       images that become floats only when a batch asks for them
    augment      random crops, flips and colours
    decode       from a JPEG file to the pixels of a batch
    decoders     processes that do so
    sampler      which examples are in the batch of a step
    ahead        makes the next batches on a thread while a step runs
    catalogue    the data sets known by name, from sources.toml
    fetch        finds, checks and downloads their files; archive unpacks them
    bounded, unpickle
                 read files that are not trusted: limited sizes, no code of a pickle
"""

from npdrt.data.ahead import Ahead
from npdrt.data.augment import AUGMENTS
from npdrt.data.dataset import Dataset
from npdrt.data.decoders import Decoders
from npdrt.data.expected import Expected
from npdrt.data.fetch import fetch, listing, verify
from npdrt.data.images import Images
from npdrt.data.load import load
from npdrt.data.sampler import Sampler

__all__ = [
    "AUGMENTS",
    "Ahead",
    "Dataset",
    "Decoders",
    "Expected",
    "Images",
    "Sampler",
    "fetch",
    "listing",
    "load",
    "verify",
]
