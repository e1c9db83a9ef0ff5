"""The letters that name array axes, and the array types made of them.

b batch   t time   h query heads   hk key/value heads   k key dimension   v value dimension
n sequences (or chunks)   c tokens in a chunk   r query heads of a key/value head   d model width
"""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "Bonus", "Float", "Gate", "Ids", "Int", "Key", "Query", "Starts", "State", "Value"]

Query = Float[Array | np.ndarray, "b t h k"]
Key = Float[Array | np.ndarray, "b t hk k"]
Value = Float[Array | np.ndarray, "b t hk v"]
Gate = Float[Array | np.ndarray, "..."]  # the shape says the kind: [hk], [b, t, hk] or [b, t, hk, k]
Bonus = Float[Array | np.ndarray, "hk k"]
State = Float[Array | np.ndarray, "n hk k v"]  # n is b, or the number of sequences
Ids = Int[Array | np.ndarray, "b t"]
Starts = Bool[Array | np.ndarray, "b t"]
