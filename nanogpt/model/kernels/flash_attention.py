"""Causal flash attention as Pallas kernels, for NVIDIA GPUs through Pallas's Triton backend.

FlashAttention (arXiv:2205.14135) loops over blocks of keys with a running maximum and sum of each
query's softmax, so that no [T, T] matrix is stored. The backward pass recomputes the scores from q,
k and the softmax's log-sum-exp (FlashAttention-2, arXiv:2307.08691).

With causal, window and document masks, each query sees one interval of keys:

    query t sees the keys       first(t) .. t
    key t is seen by queries    t .. last(t)

Both ends grow with t, so the intervals of a block's first and last row determine which blocks are
seen by none of its rows (skipped), by all (computed without a mask) or by some (masked).

In each of the three kernels, a program has a block of rows of one head and loops over columns:

    forward    rows are queries, columns keys    output and log-sum-exp
    dq         rows are queries, columns keys    gradient of the queries
    dkv        rows are keys, columns queries    gradients of keys and values

On a CPU they are interpreted, slowly, for tests. JAX 0.12 deprecates Pallas's Triton backend with a
warning; if it is removed, `nanogpt.model.attention.choose_attention` falls back to XLA.

Shapes: B batch, T sequence, N heads, H head size, R rows or columns of a block.
"""

from functools import partial
from math import e, log2
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

LOG2_E = log2(e)  # exp(x) = exp2(LOG2_E * x), and the hardware has an exp2 instruction

# Hopper multiplies matrices with groups of four warps and at least 64 rows. Larger blocks waste
# more of the diagonal, and at a head size of 128 they spill registers or leave room for only one
# program per multiprocessor. With these sizes it runs two (H 128) or up to four (H 64), unspilled.
BLOCK = 64
WARPS = 4


class Static(NamedTuple):
    """Compile-time constants of the kernels."""

    scale: float
    window: int  # where documents do not matter; else it is in `first` and `last`
    block: int
    interpret: bool = False


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q kᵀ) v over the keys each query sees, with the softmax in float32.

    Args:
        q, k, v: queries, keys and values, bfloat16 or float32; H is a power of two.
        documents: an id for each token; a query sees only the keys of its own document, the
            adjacent tokens with the same id. None: a row is one document.
        scale: factor on the products q·k before the softmax; positive.
        window: number of keys that a query sees, its own included; None for all earlier ones. With
            documents it may be an input of the program.
        block: rows and columns of a block, a power of two.

    Raises ValueError for other head sizes or scales.
    """
    T, H = q.shape[1], q.shape[3]
    if H < 16 or H & (H - 1):
        raise ValueError(f"flash attention needs a head size of 16, 32, 64, ..., not {H}")
    if not scale > 0:
        raise ValueError(f"flash attention needs a positive scale, not {scale}")
    missing = -T % block
    if missing:  # no token sees the padding at the end
        q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
        if documents is not None:
            documents = jnp.pad(documents, ((0, 0), (0, missing)))
    end = T + missing
    keys = end if window is None else window
    if documents is None:
        first, last, known = None, None, min(int(keys), end)
    else:
        (first, last), known = _first_and_last(documents, keys), end
    return _attend(q, k, v, first, last, Static(float(scale), known, block))[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, first, last, static):
    return _forward(q, k, v, first, last, static)[0]


def _forward(q, k, v, first, last, static):
    B, T, N, _ = q.shape
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    out, lse = _call(_flash_forward, static, 3, rows=(q, first), whole=(k, v), results=(v, lse))
    return out, (q, k, v, first, last, out, lse)


def _backward(static, residuals, dout):
    q, k, v, first, last, out, lse = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * out, axis=-1).swapaxes(1, 2)

    rows, whole = (q, dout, lse, delta, first), (k, v)
    (dq,) = _call(_flash_dq, static, 2, rows=rows, whole=whole, results=(q,))

    rows, whole = (k, v, last), (q, dout, lse, delta)
    dk, dv = _call(_flash_dkv, static, 2, rows=rows, whole=whole, results=(k, v))
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _first_and_last(documents, window):
    """Return the first key each query sees and the last query that sees each key, int32[B, T]."""
    t = jnp.arange(documents.shape[1], dtype=jnp.int32)
    change = documents[:, 1:] != documents[:, :-1]
    begins, ends = jnp.pad(change, ((0, 0), (1, 0))), jnp.pad(change, ((0, 0), (0, 1)))
    first = jax.lax.cummax(jnp.where(begins, t, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, t, len(t) - 1), axis=1, reverse=True)
    return jnp.maximum(first, t - window + 1), jnp.minimum(last, t + window - 1)


# The kernels. References to rows and results are one block of them, [R, H] or [R]; references to
# columns are the whole sequence, [T, H] or [T].


def _flash_forward(i, q_ref, first_ref, k_ref, v_ref, out_ref, lse_ref, *, static):
    R, H = q_ref.shape
    q, scale = q_ref[...], static.scale * LOG2_E

    def step(columns, hide, carry):
        out, top, total = carry
        scores = hide(_dot(q, k_ref[columns, :].T))
        new_top = jnp.maximum(top, scale * scores.max(axis=1))
        weights = _exp2(scores, scale, new_top[:, None], static)
        shrink = _exp2(top, 1.0, new_top, static)
        out = shrink[:, None] * out + _dot(weights.astype(v_ref.dtype), v_ref[columns, :])
        return out, new_top, shrink * total + weights.sum(axis=1)

    carry = jnp.zeros((R, H)), jnp.full((R,), -jnp.inf), jnp.zeros((R,))
    first = _bound(i, first_ref, lambda t: jnp.maximum(t - static.window + 1, 0), R)
    last = _bound(i, None, lambda t: t, R)
    out, top, total = _over_seen_columns(step, carry, first, last)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)  # in base 2


def _flash_dq(i, q_ref, dout_ref, lse_ref, delta_ref, first_ref, k_ref, v_ref, dq_ref, *, static):
    R, H = q_ref.shape
    q, dout, lse, delta = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]

    def step(columns, hide, dq):
        k, v = k_ref[columns, :], v_ref[columns, :]
        weights = _exp2(hide(_dot(q, k.T)), static.scale * LOG2_E, lse[:, None], static)
        dscores = weights * (_dot(dout, v.T) - delta[:, None])
        return dq + _dot(dscores.astype(k.dtype), k)

    first = _bound(i, first_ref, lambda t: jnp.maximum(t - static.window + 1, 0), R)
    last = _bound(i, None, lambda t: t, R)
    dq = _over_seen_columns(step, jnp.zeros((R, H)), first, last)
    dq_ref[...] = (static.scale * dq).astype(dq_ref.dtype)


def _flash_dkv(
    i, k_ref, v_ref, last_ref, q_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, static
):
    R, H = k_ref.shape
    k, v = k_ref[...], v_ref[...]

    def step(columns, hide, carry):
        dk, dv = carry
        q, dout = q_ref[columns, :], dout_ref[columns, :]
        # Load per-query values only where they are needed, to save registers.
        scores = hide(_dot(k, q.T))
        weights = _exp2(scores, static.scale * LOG2_E, lse_ref[columns][None, :], static)
        dv = dv + _dot(weights.astype(dout.dtype), dout)
        dscores = weights * (_dot(v, dout.T) - delta_ref[columns][None, :])
        return dk + _dot(dscores.astype(q.dtype), q), dv

    T = q_ref.shape[0]
    first = _bound(i, None, lambda t: t, R)
    last = _bound(i, last_ref, lambda t: jnp.minimum(t + static.window - 1, T - 1), R)
    carry = jnp.zeros((R, H)), jnp.zeros((R, H))
    dk, dv = _over_seen_columns(step, carry, first, last)
    dk_ref[...] = (static.scale * dk).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _bound(i, ref, formula, R):
    """Return one bound of the interval seen by this block's first row, last row and each, [R, 1].

    It is read from `ref` if documents matter, else computed by `formula` from the row's position.
    """
    if ref is not None:
        return ref[0], ref[R - 1], ref[...][:, None]
    row = i * R
    return formula(row), formula(row + R - 1), formula(row + _iota(R))[:, None]


def _over_seen_columns(step, carry, first, last):
    """Call step(columns, hide, carry) for every block of columns that some row sees.

    `first` and `last` are the bounds of the rows' intervals, `columns` slices a block, and `hide`
    sets unseen scores [R, R] to -inf. Unmasked blocks come first, then masked ones from the
    diagonal on, so that a query sees a key in its first block: its running maximum is never -inf.
    """
    (first_0, first_R, firsts), (last_0, last_R, lasts) = first, last
    R = firsts.shape[0]
    div = jax.lax.div
    begin, end = div(first_0, R), div(last_R, R) + 1
    all_begin = div(first_R + R - 1, R)
    all_end = jnp.maximum(all_begin, div(last_0 + 1, R))
    unmasked = all_end - all_begin

    def unmasked_block(i, carry):
        return step(pl.ds((all_begin + i) * R, R), lambda scores: scores, carry)

    def masked_block(i, carry):
        block = end - 1 - i
        block = jnp.where(block < all_end, block - unmasked, block)
        column = block * R + _iota(R)[None, :]
        seen = (firsts <= column) & (column <= lasts)
        return step(pl.ds(block * R, R), lambda s: jnp.where(seen, s, -jnp.inf), carry)

    carry = _repeat(unmasked, unmasked_block, carry)
    return _repeat(end - begin - unmasked, masked_block, carry)


def _repeat(n, body, carry):
    """Run `fori_loop` in its own branch.

    Matrix products are still in flight when the loop ends. If their results were merged with the
    carry of an empty loop, the assembler would wait for each product before starting the next.
    """
    return jax.lax.cond(n > 0, lambda c: jax.lax.fori_loop(0, n, body, c), lambda c: c, carry)


def _iota(R):
    return jnp.arange(R, dtype=jnp.int32)


def _dot(a, b):
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _exp2(x, scale, y, static):
    """Return exp2(scale * x - y), elementwise in float32.

    This takes two instructions. The compiler would use nine, because it does not fuse the product
    and the difference and must not flush subnormal results to zero.
    """
    if static.interpret:
        return jnp.exp2(scale * x - y)
    [result] = plgpu.elementwise_inline_asm(
        "{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 t, $1, $2, t; ex2.approx.ftz.f32 $0, t; }",
        args=[x, jnp.full_like(x, scale), jnp.broadcast_to(y, x.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def _call(kernel, static, stages, *, rows, whole, results):
    """Run a kernel on a grid of (blocks of rows, B, N).

    A program gets block i of `rows` and `results`, and all T rows of `whole`. Each array is
    [B, T, N, H], [B, N, T] or [B, T], or None. `stages` is the number of pipeline stages: blocks of
    columns in flight from memory, including the one in use.
    """
    B, T, N, _ = rows[0].shape

    def spec(x, R):
        if x is None:
            return None
        at = (lambda i: i) if R < T else (lambda i: 0)
        if x.ndim == 4:
            return pl.BlockSpec((None, R, None, x.shape[3]), lambda i, b, n: (b, at(i), n, 0))
        if x.ndim == 3:
            return pl.BlockSpec((None, None, R), lambda i, b, n: (b, n, at(i)))
        return pl.BlockSpec((None, R), lambda i, b, n: (b, at(i)))

    def call(*args, static):
        def run(*refs):
            i = pl.program_id(0)
            body = partial(kernel, i, *refs, static=static)
            # Inside `jax.shard_map`, the interpreter checks over which mesh axes the outermost
            # operations of a kernel vary, which a kernel does not declare; branches are exempt.
            pl.when(i >= 0)(body) if static.interpret else body()

        # The results vary over the same mesh axes of `jax.shard_map` as the arguments.
        varying = jax.typeof(rows[0]).manual_axis_type
        shape = partial(jax.ShapeDtypeStruct, manual_axis_type=varying)
        return pl.pallas_call(
            run,
            grid=(T // static.block, B, N),
            in_specs=[spec(x, static.block) for x in rows] + [spec(x, T) for x in whole],
            out_specs=[spec(x, static.block) for x in results],
            out_shape=[shape(x.shape, x.dtype) for x in results],
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=stages),
            interpret=static.interpret,
            name=kernel.__name__,
        )(*args)

    interpreted = partial(call, static=static._replace(interpret=True))
    compiled = partial(call, static=static)
    return jax.lax.platform_dependent(*rows, *whole, cpu=interpreted, default=compiled)
