"""Loops in place of cases: a test is called for each of many values without a case for each, which costs more."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

Values = Iterable[Any] | Mapping[str, Any]


def for_each(names: str, values: Values | Callable[[], Values]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test once for each of `values`, as `pytest.mark.parametrize` would, but within one case.

    `names` are its arguments, separated by commas; a mapping's keys name its values; a function of no arguments gives
    values that are known only when the test runs. All values are tried; the first error is raised, with a note that
    names the values of all that failed. Fixtures are shared by all calls: what needs a folder or a patch of its own
    should be parametrized.
    """
    arguments = [name.strip() for name in names.split(",")]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @wraps(test)
        def loop(**fixtures: Any) -> None:
            found = values() if callable(values) else values
            named = [*found.items()] if isinstance(found, Mapping) else [(repr(value), value) for value in found]
            assert named, f"no values of {names}: nothing is tested"
            errors: dict[str, Exception] = {}
            for name, value in named:
                given = (value,) if len(arguments) == 1 else value
                try:
                    test(**dict(zip(arguments, given, strict=True)), **fixtures)
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
