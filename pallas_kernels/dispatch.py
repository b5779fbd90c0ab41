"""Chooses the implementation of an op.

Each op lists its implementations in order of preference for a platform; one that cannot serve a case raises
`NotImplementedError`, and the next one is tried. The reference serves everything and is last. No registry: the list
is an argument.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def default_platform() -> str:
    """The platform that programs traced now are for: "cpu", "tpu" or "gpu". The only place that asks.

    Ahead-of-time compiles for devices that are not at hand pass `platform` themselves.
    """
    return jax.default_backend()


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    order: Mapping[str, Sequence[str]],
    *args: Any,
    platform: str | None = None,
    implementation: str | None = None,
    **kwargs: Any,
) -> Any:
    """Calls the first implementation that serves the case.

    `order` names implementations by platform. `implementation` forces one. Errors: `ValueError` for an unknown
    name, `ExceptionGroup` of `NotImplementedError` when all refuse.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(f"implementation: {op} has {sorted(implementations)}, not {implementation!r}")
    if implementation is not None:
        names: Sequence[str] = (implementation,)
    else:
        platform = platform or default_platform()
        if platform not in order:
            raise ValueError(f"platform: {op} knows {sorted(order)}, not {platform!r}")
        names = order[platform]
    refusals: list[NotImplementedError] = []
    for name in names:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as refusal:
            refusal.add_note(f"{op}: implementation {name!r}")
            refusals.append(refusal)
    raise ExceptionGroup(f"{op}: no implementation serves this case (tried {', '.join(names)})", refusals)
