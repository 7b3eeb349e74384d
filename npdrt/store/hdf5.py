"""Write the HDF5 image of a container: groups and contiguous arrays, nothing else.

Equal arrays in equal order give equal bytes: no times are stored, and the format is fixed at that
of HDF5 1.10, the first in which metadata have checksums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from io import BufferedRandom
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5f, h5fd, h5g, h5p, h5s, h5t

Put = Callable[[str, npt.NDArray[Any]], int]


@contextlib.contextmanager
def writing(handle: BufferedRandom, block: int) -> Iterator[Put]:
    """Yield `put(name, array)`, which writes an array and returns its offset in the file, bytes.

    block: bytes before the image, a power of two from 512. An array without elements has the
    offset 0. Groups are made as names need them. (Data are not aligned and groups do not stay open:
    both would make HDF5 take time quadratic in the number of arrays.)
    """
    group_settings, settings = h5p.create(h5p.GROUP_CREATE), h5p.create(h5p.DATASET_CREATE)
    group_settings.set_obj_track_times(False)
    settings.set_obj_track_times(False)
    with _new_file(handle, block) as file:
        made: set[str] = set()

        def make_groups(name: str) -> None:
            above = name.rpartition("/")[0]
            if above and above not in made:
                make_groups(above)
                h5g.create(file.id, above.encode(), gcpl=group_settings)
                made.add(above)

        def put(name: str, array: npt.NDArray[Any]) -> int:
            make_groups(name)
            data = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
            space = h5s.create_simple(data.shape) if data.ndim else h5s.create(h5s.SCALAR)
            dataset = h5d.create(file.id, name.encode(), h5t.py_create(data.dtype), space, settings)
            dataset.write(h5s.ALL, h5s.ALL, data)
            return dataset.get_offset() if data.size else 0

        yield put


def _new_file(handle: BufferedRandom, block: int) -> h5py.File:
    """An empty HDF5 file that writes through `handle`; the defaults of h5py store times."""
    creation, access = h5p.create(h5p.FILE_CREATE), h5p.create(h5p.FILE_ACCESS)
    creation.set_userblock(block)
    creation.set_obj_track_times(False)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5fd.fileobj_driver, handle)
    return h5py.File(h5f.create(b"container", h5f.ACC_TRUNC, creation, access))
