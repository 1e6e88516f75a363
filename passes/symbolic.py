"""Numbers that depend on dynamic dimensions, as polynomials: exact, or not known at all.

``batch * 64 // 64`` is ``batch``. What cannot be simplified gets a name made of how it is computed,
so that the same computation is the same number wherever it stands. Plain integers stay integers.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of dimensions, each of which is at least 0; never a plain integer."""

    terms: tuple[tuple[tuple[str, ...], int], ...]
    """The symbols of each product, sorted, and its factor, which is not 0."""

    def __str__(self) -> str:
        return "+".join("*".join((str(factor), *symbols)) for symbols, factor in self.terms)


Number: TypeAlias = int | Polynomial


def symbol(name: str) -> Polynomial:
    """Return the number that ``name`` stands for."""
    return Polynomial((((name,), 1),))


def add(a: Number, b: Number) -> Number:
    """Return ``a + b``."""
    total = Counter(_terms(a))
    for symbols, factor in _terms(b).items():
        total[symbols] += factor
    return _number(total)


def multiply(a: Number, b: Number) -> Number:
    """Return ``a * b``."""
    total: Counter[tuple[str, ...]] = Counter()
    for one, x in _terms(a).items():
        for two, y in _terms(b).items():
            total[tuple(sorted(one + two))] += x * y
    return _number(total)


def subtract(a: Number, b: Number) -> Number:
    """Return ``a - b``."""
    return add(a, multiply(b, -1))


def product(numbers: Iterable[Number]) -> Number:
    """Return the product of all ``numbers``."""
    total: Number = 1
    for number in numbers:
        total = multiply(total, number)
    return total


def divided(a: Number, b: Number) -> Number | None:
    """Return ``a / b`` where that is exact for all dimensions, else None."""
    if a == b and b != 0:
        return 1
    divisor = _terms(b)
    if len(divisor) != 1 or b == 0:
        return None
    ((symbols, factor),) = divisor.items()
    found: dict[tuple[str, ...], int] = {}
    for term, count in _terms(a).items():
        left = Counter(term)
        left.subtract(symbols)
        if count % factor or any(power < 0 for power in left.values()):
            return None
        found[tuple(sorted(left.elements()))] = count // factor
    return _number(found)


def divide(a: Number, b: Number) -> Number | None:
    """Return ``a / b`` as ONNX divides integers, towards 0; None where that is not known."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        whole = abs(a) // abs(b)
        return whole if (a < 0) == (b < 0) else -whole
    exact = divided(a, b)
    if exact is None and is_natural(a) and is_natural(b):
        return symbol(f"({a})/({b})")
    return exact


def remainder(a: Number, b: Number) -> Number | None:
    """Return ``a`` modulo ``b``, both at least 0; None where that is not known."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b if a >= 0 and b > 0 else None
    if not (is_natural(a) and is_natural(b)) or b == 0:
        return None
    return 0 if divided(a, b) is not None else symbol(f"({a})%({b})")


def equal(a: Number, b: Number) -> bool | None:
    """Tell whether two numbers are equal for all dimensions, for none, or (None) for some."""
    difference = subtract(a, b)
    if isinstance(difference, int):
        return difference == 0
    for one, two in ((a, b), (b, a)):
        if isinstance(two, int) and two < 0 and is_natural(one):
            return False
    return None


def less(a: Number, b: Number) -> bool | None:
    """Tell whether ``a < b`` for all dimensions, for none, or (None) for some."""
    if is_natural(subtract(subtract(b, a), 1)):
        return True
    return False if is_natural(subtract(a, b)) else None


def is_natural(number: Number) -> bool:
    """Tell whether ``number`` is at least 0 for all dimensions, as far as can be seen."""
    return all(factor >= 0 for factor in _terms(number).values())


def _terms(number: Number) -> dict[tuple[str, ...], int]:
    return {(): number} if isinstance(number, int) else dict(number.terms)


def _number(terms: Mapping[tuple[str, ...], int]) -> Number:
    kept = {symbols: factor for symbols, factor in terms.items() if factor}
    if not kept.keys() - {()}:
        return kept.get((), 0)
    return Polynomial(tuple(sorted(kept.items())))
