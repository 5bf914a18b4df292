"""Several API processes: a shared job store in Redis, and the application for Ray Serve.

    serve run service.cluster:app

The job store does not need Ray, so nothing here imports it until app() is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(arguments: Mapping[str, Any]) -> Application:
    """The application for `serve run`, with its arguments (`max_engines=4`); settings are LDM_* variables.

    Raises SettingError for a wrong argument or setting, and without a version of Ray that is new enough.
    """
    from service.cluster.ray_version import check_ray

    check_ray()
    from service.cluster.application import build

    return build(arguments)
