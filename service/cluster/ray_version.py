"""Whether the installed version of Ray Serve can be used."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from service.settings import SettingError

MIN_RAY = (2, 56)  # the first version with DeploymentHandle.broadcast()


def check_ray() -> None:
    """Raise SettingError if Ray is missing or too old."""
    needed = "the cluster needs Ray Serve {}.{} or later: pip install '.[cluster]'".format(*MIN_RAY)
    try:
        found = version("ray")
    except PackageNotFoundError:
        raise SettingError(f"{needed}; Ray is not installed") from None
    if tuple(map(int, found.split(".")[:2])) < MIN_RAY:
        raise SettingError(f"{needed}; the installed version is {found}")
