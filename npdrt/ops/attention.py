"""Scaled dot-product attention, a primitive, and multi-head attention, which is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from npdrt import compute
from npdrt.arrays import Array, at_once, namespace, real
from npdrt.autodiff import once, primitive
from npdrt.compute import has_kernels, product, total
from npdrt.errors import Error
from npdrt.ops.dropout import broadcasts, check_keep, check_rate
from npdrt.ops.linear import linear
from npdrt.ops.rows import row_softmax, row_softmax_input
from npdrt.ops.shape import getitem, reshape, transpose

__all__ = ["attention", "multi_head_attention"]

BLOCK = 1 << 20  # scores that are computed at once on a CPU, in whole heads; at least one head
QUERIES = 128  # of a causal head at once on a CPU: the keys after the last of them are left out
KEPT = 1 << 22  # scores up to which the exponentials are kept for the backward pass


@primitive(computes=slice(3))
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array = None,
    keep: Array = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    rate: float = 0.0,
) -> Any:
    """softmax(scale q k^T + mask) v, the softmax over the keys, for every head.

    q: (..., L, d), k: (..., S, d), v: (..., S, e), with the same leading axes (batch, heads).
    Returns (..., L, e). scale: 1 / sqrt(d) unless given.
    mask: broadcasts to (..., L, S). Boolean: True where a query may attend to a key. Floating:
    added to the scores, -inf where it may not. PyTorch's `scaled_dot_product_attention` takes
    both so; its `nn.MultiheadAttention` takes booleans the other way round.
    causal: query i attends to keys 0 to i, even if S is not L; with a mask, both must allow a key.
    A query that may attend to nothing gives zeros and gets no gradient, as in PyTorch's function
    (its module gives NaN if it returns weights).
    keep, rate: dropout of the probabilities, keep (..., L, S) as in `dropout`.

    With P the softmax, M = keep / (1 - rate), and o the elementwise product,

        y = (P o M) v,      dS = P o ((g v^T) o M - rowsum(g o y))
        gq = scale dS k,    gk = scale dS^T q,    gv = (P o M)^T g,    gmask = dS (if floating)

    rowsum(g o y) equals the usual rowsum(dP o P), but costs L e instead of L S. Likewise the row
    sums divide y and g, not P (on a GPU P, which a kernel makes: `npdrt.ops.rows`). The heads are
    taken in blocks of at most BLOCK scores (2**26 on a GPU), at least one head; the blocks change
    no bit. On a CPU a causal head of more than QUERIES queries is computed so many at a time, each
    part with the keys up to its last query, and gk and gv are summed over the parts, the last part
    first. Up to KEPT scores, or for one block, the backward pass reuses the exponentials of the
    forward pass; beyond, it computes them again, with the same bits, and holds only the scores of
    one block at a time. The derivative by a mask is a separate pass and holds all scores.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1; the row sums of the
    derivative, Dao et al. 2022, "FlashAttention", appendix B.2.
    """
    heads = _heads(q, k, v, mask, keep, causal, scale, rate)
    leads = _blocks(tuple(q.shape[:-2]), heads.atonce())
    blocks = [_Block(lead, *part) for lead in leads for part in heads.parts()]
    kept = len(blocks) == 1 or math.prod(q.shape[:-1]) * k.shape[-2] <= KEPT
    saved: list[_Saved] = []
    y = None
    for at in blocks:
        part, *statistics, e = heads.forward(at)
        saved.append((at, *statistics, e if kept else None))
        y = _put(y, (*at.heads, at.queries, ALL), part, (*q.shape[:-1], v.shape[-1]))

    @once
    def inputs(g: Array) -> list[Array]:
        """The cotangents of q, k and v."""
        found: list[Any] = [None, None, None]
        for at, *rest in saved:
            parts = heads.backward(g, y, at, *rest)
            found[0] = _put(found[0], (*at.heads, at.queries, ALL), parts[0], q.shape)
            for i, x in ((1, k), (2, v)):
                index = (*at.heads, at.keys, ALL)
                part = parts[i] if at.first else found[i][index] + parts[i]
                found[i] = _put(found[i], index, part, x.shape)
        return found

    def gmask(g: Array) -> Array:
        found = None
        for at, *rest in saved:
            ds = heads.by_scores(g, y, at, *rest)
            index, shape = (*at.heads, at.queries, at.keys), (*q.shape[:-1], k.shape[-2])
            found = _put(found, index, ds, shape)
        return found

    boolean = mask is None or mask.dtype == namespace(mask).bool
    return y, (
        lambda g: inputs(g)[0],
        lambda g: inputs(g)[1],
        lambda g: inputs(g)[2],
        None if boolean else gmask,
    )


def multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    in_weight: Any,
    in_bias: Any,
    out_weight: Any,
    out_bias: Any,
    mask: Any = None,
    keep: Any = None,
    *,
    heads: int,
    causal: bool = False,
    rate: float = 0.0,
) -> Any:
    """Attention by several heads on projected queries, keys and values, projected again.

        q = query Wq^T + bq,   k = key Wk^T + bk,   v = value Wv^T + bv
        y = (heads of attention(q, k, v), side by side) Wo^T + bo

    query: (N, L, E), key and value: (N, S, E), batch first. in_weight: (3E, E), Wq above Wk above
    Wv, and in_bias: (3E,) or None; out_weight: (E, E) and out_bias: (E,) or None: the parameters
    of PyTorch's `nn.MultiheadAttention`. Head h has the features h E / heads to (h + 1) E / heads.
    Returns (N, L, E). mask: broadcasts to (N, heads, L, S), as in `attention` (a mask of padding,
    True at real keys, is (N, 1, 1, S)); keep: (N, heads, L, S), from `keep_mask`.

    Source: Vaswani et al. 2017, section 3.2.2.
    """
    _check_projections(query, key, value, in_weight, in_bias, out_weight, heads)
    size = query.shape[-1]

    def projected(x: Any, number: int) -> Any:
        """The heads of one projection."""
        part = slice(number * size, (number + 1) * size)
        bias = None if in_bias is None else getitem(in_bias, index=part)
        rows = linear(x, getitem(in_weight, index=part), bias)
        cut = reshape(rows, shape=(*x.shape[:-1], heads, size // heads))
        return transpose(cut, axes=(0, 2, 1, 3))  # (N, heads, length, E / heads)

    q, k, v = (projected(x, number) for number, x in enumerate((query, key, value)))
    y = attention(q, k, v, mask, keep, causal=causal, rate=rate)  # (N, heads, L, E / heads)
    y = reshape(transpose(y, axes=(0, 2, 1, 3)), shape=tuple(query.shape))  # (N, L, E)
    return linear(y, out_weight, out_bias)


# --- blocks of heads --------------------------------------------------------------------------

Index = tuple[Any, ...]
ALL = slice(None)
_Saved = tuple[Any, ...]  # a block, its rows' maxima and sums, its exponentials or None


class _Block(NamedTuple):
    """Some heads (slices of the leading axes and `...`), some of their queries, and the keys from 0
    on that these may attend to. first: of the blocks of these heads, with all such keys."""

    heads: Index
    queries: slice
    keys: slice
    first: bool


@dataclass(frozen=True)
class _Heads:
    """The arguments of `attention`. Masks have as many axes as the scores; small boolean ones are
    made floating. `triangle`, (L, S), is the causal mask."""

    q: Array
    k: Array
    v: Array
    mask: Array
    keep: Array
    triangle: Array
    scale: float
    grow: float

    def atonce(self) -> int:
        """How many heads a block has."""
        scores: int = self.q.shape[-2] * self.k.shape[-2]
        return max(1, at_once(self.q, BLOCK) // max(1, scores))

    def parts(self) -> Iterator[tuple[slice, slice, bool]]:
        """The queries, the keys and the `first` of a head's blocks."""
        queries, keys = self.q.shape[-2], self.k.shape[-2]
        if self.triangle is None or queries <= QUERIES:
            yield slice(0, queries), slice(0, keys), True
            return
        for start in reversed(range(0, queries, QUERIES)):
            stop = min(start + QUERIES, queries)
            yield slice(start, stop), slice(0, min(stop, keys)), stop == queries

    def forward(self, at: _Block) -> tuple[Array, Array, Array, Array]:
        """The value of a block, the maxima and sums of its rows, and exp(scores - maxima)."""
        xp, s = namespace(self.q), self._scores(at)  # (..., L, S)
        top = xp.max(real(s), axis=-1, keepdims=True)  # (..., L, 1)
        top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
        e = compute.exp(s - top)
        sums = total(e, (e.ndim - 1,), keepdims=True)  # (..., L, 1)
        sums = xp.where(sums == 0, xp.ones_like(sums), sums)  # nothing to attend to
        return product(self._dropped(e, at), _keys(self.v, at)) * (self.grow / sums), top, sums, e

    def backward(
        self, g: Array, y: Array, at: _Block, top: Array, sums: Array, e: Array
    ) -> tuple[Array, Array, Array, Array]:
        """The cotangents of a block of q, k, v and of its scores."""
        xp = namespace(self.q)
        e = compute.exp(self._scores(at) - top) if e is None else e
        g, q, k, v = _queries(g, at), _queries(self.q, at), _keys(self.k, at), _keys(self.v, at)
        along = total(g * _queries(y, at), (y.ndim - 1,), keepdims=True) / sums  # (..., L, 1)
        g = g * (self.grow / sums)  # (..., L, e)
        gp = self._dropped(product(g, xp.matrix_transpose(v)), at)  # (..., L, S)
        ds = e * (gp - along)  # (..., L, S)
        gq = product(ds, k) * self.scale  # (..., L, d)
        gk = product(xp.matrix_transpose(ds), q * self.scale)  # (..., S, d)
        return gq, gk, product(xp.matrix_transpose(self._dropped(e, at)), g), ds

    def by_scores(self, g: Array, y: Array, *block: Any) -> Array:
        """The cotangent of a block of the scores."""
        return self.backward(g, y, *block)[3]

    def _scores(self, at: _Block) -> Array:
        xp = namespace(self.q)
        s = product(_queries(self.q, at) * self.scale, xp.matrix_transpose(_keys(self.k, at)))
        s = s if self.mask is None else s + _additive(_part(self.mask, at), real(self.q).dtype)
        return s if self.triangle is None else s + self.triangle[at.queries, at.keys]

    def _dropped(self, x: Array, at: _Block) -> Array:
        """x where probabilities are kept, else 0; not yet divided by 1 - rate."""
        if self.keep is None:
            return x
        return x * namespace(x).astype(_part(self.keep, at), x.dtype)


@dataclass(frozen=True)
class _RowHeads(_Heads):
    """The same with kernels for the softmax of the scores (`npdrt.ops.rows`): what `_Heads` calls e
    are the probabilities themselves."""

    causal: bool

    def forward(self, at: _Block) -> tuple[Array, Array, Array, Array]:
        """The value of a block, and its probabilities."""
        p = self._probabilities(at)
        y = product(self._dropped(p, at), _keys(self.v, at))
        return y if self.keep is None else y * self.grow, None, None, p

    def backward(
        self, g: Array, y: Array, at: _Block, top: Array, sums: Array, e: Array
    ) -> tuple[Array, Array, Array, Array]:
        """The cotangents of a block of q, k, v, and of its scores, times the scale."""
        p = self._probabilities(at, e)
        g = _queries(g, at) if self.keep is None else _queries(g, at) * self.grow  # (..., L, e)
        ds = self._by_scores(g, at, p, self.scale)  # (..., L, S)
        gv = product(namespace(g).matrix_transpose(self._dropped(p, at)), g)  # (..., S, e)
        gk = product(namespace(g).matrix_transpose(ds), _queries(self.q, at))  # (..., S, d)
        return product(ds, _keys(self.k, at)), gk, gv, ds

    def by_scores(self, g: Array, y: Array, *block: Any) -> Array:
        """The cotangent of a block of the scores."""
        at, *_, e = block
        g = _queries(g, at) * self.grow
        return self._by_scores(g, at, self._probabilities(at, e), 1.0)

    def _by_scores(self, g: Array, at: _Block, p: Array, scale: float) -> Array:
        gp = product(g, namespace(g).matrix_transpose(_keys(self.v, at)))
        return row_softmax_input(self._dropped(gp, at), p, scale=scale)

    def _probabilities(self, at: _Block, kept: Array = None) -> Array:
        """The softmax of a block of scores, (..., L, S), unless it was kept."""
        if kept is not None:
            return kept
        q, k = _queries(self.q, at), _keys(self.k, at)
        s = product(q, namespace(q).matrix_transpose(k))
        masks = () if self.mask is None else (_additive(_part(self.mask, at), self.q.dtype),)
        settings = {"scale": self.scale, "causal": self.causal, "empty": True}
        return row_softmax(s, *masks, **settings)


def _heads(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    keep: Array,
    causal: bool,
    scale: float | None,
    rate: float,
) -> _Heads:
    """The arguments of `attention`, checked and prepared."""
    _check(q, k, v, mask, keep, rate)
    xp, (queries, keys), dtype = namespace(q), (q.shape[-2], k.shape[-2]), real(q).dtype
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if mask is not None:
        mask = _with_axes(mask, q.ndim)
        small = math.prod(mask.shape) <= max(at_once(q, BLOCK), queries * keys)
        mask = _additive(mask, dtype) if small else mask
    keep = None if keep is None else _with_axes(keep, q.ndim)
    grow = 1.0 if keep is None else 1 / (1 - rate)
    if q.ndim <= 4 and has_kernels(q):
        return _RowHeads(q, k, v, mask, keep, None, scale, grow, causal)
    triangle = None
    if causal:
        rows, columns = xp.arange(queries)[:, None], xp.arange(keys)[None, :]
        triangle = _additive(columns <= rows, dtype)
    return _Heads(q, k, v, mask, keep, triangle, scale, grow)


def _additive(mask: Array, dtype: Any) -> Array:
    """A boolean mask as 0 and -inf; a floating one as it is."""
    xp = namespace(mask)
    if mask.dtype != xp.bool:
        return mask
    return xp.where(mask, xp.zeros((), dtype=dtype), xp.full((), -math.inf, dtype=dtype))


def _with_axes(x: Array, ndim: int) -> Array:
    """x with leading axes of length 1, `ndim` in all."""
    return namespace(x).reshape(x, (*[1] * (ndim - x.ndim), *x.shape))


def _blocks(lead: tuple[int, ...], count: int) -> Iterator[Index]:
    """Indices that cut the leading axes into blocks of at most `count` heads; `(...,)` for all."""
    inside = math.prod(lead[1:])
    if inside * math.prod(lead[:1]) <= count:
        yield (...,)
    elif inside <= count:
        step = count // inside
        yield from ((slice(i, min(i + step, lead[0])), ...) for i in range(0, lead[0], step))
    else:
        for i in range(lead[0]):
            yield from ((slice(i, i + 1), *rest) for rest in _blocks(lead[1:], count))


def _queries(x: Array, at: _Block) -> Array:
    """A block's part of an array (..., L, features)."""
    return x[(*at.heads, at.queries, ALL)]


def _keys(x: Array, at: _Block) -> Array:
    """A block's part of an array (..., S, features)."""
    return x[(*at.heads, at.keys, ALL)]


def _part(mask: Array, at: _Block) -> Array:
    """The block of a mask (..., L, S), some of whose axes may have length 1."""
    axes = (*enumerate(at.heads[:-1]), (-2, at.queries), (-1, at.keys))
    *lead, queries, keys = (ALL if mask.shape[axis] == 1 else chosen for axis, chosen in axes)
    return mask[(*lead, ..., queries, keys)]


def _put(whole: Any, index: Index, part: Array, shape: tuple[int, ...]) -> Array:
    """Put a part into the array `whole` of `shape`; None means that this is the first one."""
    if tuple(part.shape) == tuple(shape):
        return part
    whole = namespace(part).zeros(shape, dtype=part.dtype) if whole is None else whole
    whole[index] = part
    return whole


# --- checks -----------------------------------------------------------------------------------


def _check(q: Array, k: Array, v: Array, mask: Array, keep: Array, rate: float) -> None:
    """Refuse shapes and dtypes that do not fit."""
    xp, shapes = namespace(q, k, v, mask, keep), [tuple(x.shape) for x in (q, k, v)]
    leads = {shape[:-2] for shape in shapes}
    if min(map(len, shapes)) < 2 or len(leads) > 1 or q.shape[-1] != k.shape[-1]:
        raise Error(
            "attention: expected q (..., L, d), k (..., S, d) and v (..., S, e) with the same "
            f"leading axes; got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if k.shape[-2] != v.shape[-2] or 0 in (k.shape[-2], k.shape[-1]):
        raise Error(
            "attention: expected as many values as keys, at least 1, of at least 1 number; got "
            f"k {shapes[1]} and v {shapes[2]}"
        )
    if mask is not None and not (mask.dtype == xp.bool or real(mask).dtype == real(q).dtype):
        raise Error(
            f"attention: expected a mask that is boolean or {real(q).dtype}, as q is; got "
            f"{mask.dtype}"
        )
    scores = (*shapes[0][:-1], k.shape[-2])
    if mask is not None and not broadcasts(tuple(mask.shape), scores):
        raise Error(
            f"attention: the mask has shape {tuple(mask.shape)}, which does not broadcast to "
            f"{scores}"
        )
    check_rate("attention", rate)
    if keep is not None:
        check_keep("attention", keep, scores)


def _check_projections(
    query: Any, key: Any, value: Any, in_weight: Any, in_bias: Any, out_weight: Any, heads: int
) -> None:
    """Refuse what `multi_head_attention` cannot cut into heads."""
    shapes = [tuple(x.shape) for x in (query, key, value)]
    size = shapes[0][-1] if shapes[0] else 0
    if {len(shape) for shape in shapes} != {3} or {shape[-1] for shape in shapes} != {size}:
        raise Error(
            "multi_head_attention: expected query (N, L, E), key (N, S, E) and value (N, S, E); "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if heads < 1 or size % heads:
        raise Error(
            f"multi_head_attention: {size} features cannot be cut into {heads} heads of one size"
        )
    found = [tuple(x.shape) for x in (in_weight, out_weight)]
    bias = (3 * size,) if in_bias is None else tuple(in_bias.shape)
    if found != [(3 * size, size), (size, size)] or bias != (3 * size,):
        raise Error(
            f"multi_head_attention: expected in_weight {(3 * size, size)}, in_bias {(3 * size,)} "
            f"and out_weight {(size, size)} for {size} features; got {found[0]}, {bias} and "
            f"{found[1]}"
        )
