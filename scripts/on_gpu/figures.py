"""What a measurement gives: figures, and shares of what they are judged by. No measurement of its own."""

from __future__ import annotations

import msgspec


class Share(msgspec.Struct, frozen=True):
    """A figure over what it is judged by, and the least that is asked of it."""

    name: str
    value: float
    least: float

    @property
    def in_words(self) -> str:
        verdict = "met" if self.value >= self.least else "missed"
        return f"{self.name} {self.value:.3f} (at least {self.least:g}: {verdict})"


class Figures(msgspec.Struct, frozen=True):
    """`numbers`: by name, units last in it; `notes`: what could not be measured, and why."""

    numbers: dict[str, float]
    shares: tuple[Share, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        numbers = (f"{name} {value:.4g}" for name, value in self.numbers.items())
        return "; ".join((", ".join(numbers), *(share.in_words for share in self.shares), *self.notes))
