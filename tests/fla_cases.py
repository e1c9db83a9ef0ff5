"""flash-linear-attention's own tests of GLA, simple GLA, retention and linear attention, as parameters.

From tests/ops/test_{gla,simple_gla,retention,linear_attn}.py at bc3b101d. A case stands once where several of fla's
tests (of its chunked, fused, parallel and recurrent forms) share it. fla's own inputs are uniform in places; here all
are randn.
"""

from typing import NamedTuple


class Case(NamedTuple):
    """gate: the op's kind. cu: cu_seqlens, for batch 1. normalizer divides logsigmoid(randn)."""

    gate: str
    batch: int
    time: int
    heads: int
    key: int
    value: int
    normalizer: float
    scale: float | None
    dtype: str
    cu: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        cu = "" if self.cu is None else "-cu" + "_".join(map(str, self.cu))
        shape = "x".join(map(str, self[1:6]))
        return f"{self.gate}-{shape}-n{self.normalizer:g}-scale{self.scale}-{self.dtype}{cu}"

    @property
    def small(self) -> bool:
        """Whether a plain `make test` runs it."""
        return self in SMALL


def _packed(gate, heads, key, value, normalizer, scale, dtype, cu) -> Case:
    return Case(gate, 1, cu[-1], heads, key, value, normalizer, scale, dtype, cu)


F32, F16, BF16 = "float32", "float16", "bfloat16"
TINY, EMPTY, FEW, SIX = (0, 15), (0, 0, 16), (0, 256, 500, 1000), (0, 15, 100, 300, 1200, 2000)
ONE, WIDE = (0, 1, 100, 300, 1200, 2048), (0, 200, 512, 1200, 2048)

_GLA = [
    *(
        Case("vector", b, t, h, d, d, n, None, dtype)
        for dtype in (F32, F16)
        for b, t, h, d, n in (
            (1, 63, 1, 64, 1),
            (2, 1024, 4, 60, 1),
            (2, 1024, 8, 128, 0.1),
            (2, 1024, 8, 128, 1),
            (2, 1024, 8, 128, 10),
            (4, 2048, 8, 64, 1),
        )
    ),
    Case("vector", 1, 128, 4, 256, 256, 1, None, F16),
    Case("vector", 1, 64, 2, 320, 320, 1, None, F16),
    Case("vector", 1, 128, 4, 512, 512, 1, None, BF16),
    Case("vector", 2, 256, 4, 64, 64, 1, None, F32),
    Case("vector", 2, 1024, 4, 128, 128, 1, None, F16),
    *(
        _packed("vector", 4, d, d, 1, None, dtype, cu)
        for dtype, d, cu in (
            (F32, 64, TINY),
            (F32, 64, FEW),
            (F32, 100, SIX),
            (F16, 64, ONE),
            (F16, 128, WIDE),
            (F16, 64, TINY),
            (F16, 64, EMPTY),
            (F16, 64, FEW),
            (F16, 100, SIX),
        )
    ),
]

_SIMPLE = [
    *(
        Case("scalar", b, t, h, d, d, n, scale, dtype)
        for b, t, h, d, scale, n, dtype in (
            (1, 63, 1, 64, 1.0, 1, F32),
            (2, 500, 4, 60, 1.0, 1, F32),
            (2, 1024, 8, 128, 1.0, 0.1, F32),
            (2, 1024, 8, 128, 0.1, 1, F32),
            (2, 1024, 8, 128, 1.0, 10, F32),
            (4, 2048, 8, 64, 0.1, 1, F32),
            (2, 1024, 8, 128, 1.0, 0.1, F16),
            (2, 1024, 8, 128, 1.0, 10, F16),
            (2, 256, 4, 64, None, 1, F32),
            (2, 1024, 4, 128, None, 1, F16),
            (1, 63, 1, 64, 1.0, 1, F16),
            (2, 500, 3, 60, 1.0, 1, F16),
            (1, 1000, 4, 128, 1.0, 0.1, F16),
            (2, 1000, 4, 128, 0.1, 1, F16),
            (3, 1000, 4, 128, 0.1, 10, F16),
            (4, 2048, 8, 64, 0.1, 1, F16),
            (1, 64, 2, 64, 0.1, 1, F16),
            (2, 1024, 4, 128, 0.1, 1, F16),
            (3, 1024, 4, 128, 0.1, 10, F16),
            (3, 1024, 4, 256, 0.1, 0.1, F16),
            (4, 2048, 4, 64, 0.1, 0.1, F16),
        )
    ),
    *(
        _packed("scalar", 4, d, d, n, scale, dtype, cu)
        for dtype, d, scale, n, cu in (
            (F32, 64, 1.0, 1, TINY),
            (F32, 64, 1.0, 1, FEW),
            (F32, 100, 0.1, 1, SIX),
            (F32, 100, 1.0, 1, SIX),
            (F32, 100, 1.0, 10, SIX),
            (F16, 64, 1.0, 1, ONE),
            (F16, 128, 1.0, 1, WIDE),
            (F16, 64, 1.0, 1, TINY),
            (F16, 64, 1.0, 1, FEW),
            (F16, 100, 1.0, 1, SIX),
        )
    ),
    # test_simple_gla_to_mamba2: head dimension 16 (v), state dimension 64 (k).
    *(Case("scalar", 2, 512, 4, 64, 16, 10, 1.0, dtype) for dtype in (F32, F16)),
]

_RETENTION = [
    *(
        Case("head", b, t, h, d, d * expand, 1, None, F16)
        for b, t, h, d, expand in (
            (1, 63, 1, 64, 1),
            (2, 500, 3, 60, 1),
            (2, 1000, 3, 100, 1),
            (2, 1000, 3, 128, 2),
            (3, 1024, 4, 256, 2),
            (4, 2048, 4, 64, 2),
            (1, 64, 2, 64, 1),
            (2, 500, 4, 60, 1),
            (2, 1024, 8, 128, 1),
            (3, 1024, 8, 128, 2),
            (3, 1024, 8, 256, 2),
            (4, 2048, 8, 64, 2),
            (2, 256, 4, 64, 1),
            (2, 1024, 4, 128, 2),
        )
    ),
    *(
        _packed("head", 4, d, d * expand, 1, None, F16, cu)
        for d, expand, cu in ((64, 1, TINY), (64, 2, FEW), (100, 2, SIX))
    ),
]

_LINEAR = [
    Case("none", b, t, h, d, d, 1, scale, dtype)
    for b, t, h, d, scale, dtype in (
        (1, 64, 1, 64, None, F32),
        (2, 512, 4, 60, None, F32),
        (3, 1024, 8, 128, 1.0, F32),
        (3, 1024, 8, 128, 0.1, F32),
        (3, 1024, 8, 128, None, F32),
        (2, 2048, 8, 256, None, F16),
        (2, 2048, 4, 256, None, F16),
        (1, 128, 2, 64, None, F32),
        (2, 256, 4, 60, None, F32),
        (1, 63, 1, 64, None, F16),
        (2, 500, 3, 60, None, F16),
        (2, 1000, 3, 128, None, F16),
        (3, 1000, 4, 64, None, F16),
    )
]

CASES = [*_GLA, *_SIMPLE, *_RETENTION, *_LINEAR]
SMALL = [
    Case("vector", 1, 63, 1, 64, 64, 1, None, F32),
    _packed("vector", 4, 64, 64, 1, None, F16, EMPTY),
    _packed("scalar", 4, 64, 64, 1, 1.0, F32, TINY),
    Case("scalar", 2, 500, 3, 60, 60, 1, 1.0, F16),
    Case("head", 1, 64, 2, 64, 64, 1, None, F16),
    Case("none", 2, 256, 4, 60, 60, 1, None, F32),
]
assert len(set(CASES)) == len(CASES)
assert set(SMALL) <= set(CASES)
