"""Run a test over many values within one case, which costs less than a case for each value."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

Values = Iterable[Any] | Mapping[str, Any]


def for_each(names: str, values: Values | Callable[[], Values]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test once for each of `values`, as `pytest.mark.parametrize` would, but within one case.

    `names` are its arguments, separated by commas. The keys of a mapping name its values; a function without arguments
    returns values that are known only when the test runs. All values run; the first error is raised with a note that
    names the values that failed. All calls share the fixtures: parametrize a test that needs its own folder or patch.
    """
    arguments = [name.strip() for name in names.split(",")]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @wraps(test)
        def loop(**fixtures: Any) -> None:
            cases = values() if callable(values) else values
            named = [*cases.items()] if isinstance(cases, Mapping) else [(repr(value), value) for value in cases]
            assert named, f"no values of {names}: nothing is tested"
            errors: dict[str, Exception] = {}
            for name, value in named:
                row = (value,) if len(arguments) == 1 else value
                try:
                    test(**dict(zip(arguments, row, strict=True)), **fixtures)
                except Exception as error:
                    errors[name] = error
            if errors:
                first = next(iter(errors.values()))
                first.add_note(f"fails for {names} = {', '.join(errors)}")
                raise first

        # pytest treats the remaining parameters as fixtures.
        rest = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        loop.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return loop

    return decorate
