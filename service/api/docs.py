"""The page at /docs (Swagger UI), from files of this package. With no_page, / redirects to it."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from service.api.urls import path_prefix
from service.errors import NotFound

router = APIRouter(include_in_schema=False)

FOLDER = files("service.web") / "docs"
ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "initializer.js": "text/javascript",
}
# Scripts may come from this service only; Swagger UI needs inline styles and data: images.
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'"


@router.get("/")
async def root(request: Request) -> RedirectResponse:
    """Redirect to the documentation."""
    prefix = path_prefix(request)
    return RedirectResponse(f"{prefix}/docs" if prefix else "docs")


@router.get("/docs")
async def docs() -> Response:
    """The API documentation as a page."""
    headers = {"Content-Security-Policy": POLICY}
    return Response((FOLDER / "index.html").read_bytes(), media_type="text/html", headers=headers)


@router.get("/docs/{name}")
async def docs_asset(name: str) -> Response:
    """A script or style sheet of the page."""
    if name not in ASSETS:
        raise NotFound
    headers = {"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response((FOLDER / name).read_bytes(), media_type=ASSETS[name], headers=headers)
