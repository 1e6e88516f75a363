"""One small model, or several, for every operator that can be lowered."""

from lowering_cases_layers import LINEAR, NORM, POOL, RESIZE
from lowering_cases_movement import INDEX, PAD, REDUCE, SHAPE
from lowering_cases_pointwise import DRAWN, ELEMENTWISE, LOSS, QUANT
from lowering_cases_sequence import ATTENTION, RECURRENT

CASES = [
    *DRAWN,
    *ELEMENTWISE,
    *QUANT,
    *LOSS,
    *REDUCE,
    *SHAPE,
    *INDEX,
    *PAD,
    *RESIZE,
    *LINEAR,
    *POOL,
    *NORM,
    *RECURRENT,
    *ATTENTION,
]
