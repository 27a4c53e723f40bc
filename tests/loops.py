"""Loops in place of cases: a test is called for each of many values without a case for each, which costs more."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any


def each(names: str, values: Iterable[Any] | Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test once for each of `values`, as `pytest.mark.parametrize` would, but within one case.

    `names` are its arguments, separated by commas; a mapping's keys name its values. All values are tried; the first
    error is raised, with a note that names the values of all that failed. Fixtures are shared by all calls: what
    needs a folder or a patch of its own should be parametrized.
    """
    arguments = [name.strip() for name in names.split(",")]
    named = values.items() if isinstance(values, Mapping) else ((repr(value), value) for value in values)
    calls = [(name, (value,) if len(arguments) == 1 else value) for name, value in named]
    assert calls, f"no values of {names}: nothing would be tested"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @wraps(test)
        def loop(**fixtures: Any) -> None:
            errors: dict[str, Exception] = {}
            for name, value in calls:
                try:
                    test(**dict(zip(arguments, value, strict=True)), **fixtures)
                except Exception as error:
                    errors[name] = error
            if errors:
                first = next(iter(errors.values()))
                first.add_note(f"fails for {names} = {', '.join(errors)}")
                raise first

        # What pytest takes for fixtures.
        rest = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        loop.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return loop

    return decorate
