"""The coordinator's API as an OpenAPI 3.1 document. docs/openapi.yaml is what `python -m edge_agent.coordinator.openapi` prints.

Litestar tells the routes and their parameters; the schemas are msgspec's, which reads what comes: they have all that it demands.
"""

from __future__ import annotations

import sys
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig

from edge_agent.coordinator.client import PROBLEM, Problem
from edge_agent.coordinator.routes import METRICS, routes

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/{name}"
FILES = {"artifact": "application/octet-stream", "events": "text/event-stream", "job_events": "text/event-stream", "metrics": METRICS}
"""What operations answer with that is not JSON."""
BODIES = {"upload": "application/octet-stream"}
"""What operations take that is not JSON."""
EVERY_STATUS = (400, 401, 403, 429, 500, 503)
"""Of problems that any request may meet."""


FAILURES = (304, 400, 401, 403, 404, 409, 413, 416, 422, 429, 500, 503)


def document() -> Schema:
    """Return the OpenAPI document."""
    config = OpenAPIConfig("The coordinator of a fleet", "1", use_handler_docstrings=True)
    app = Litestar(routes(), openapi_config=config, logging_config=None)
    handlers = {
        (route.path_format, method): handler
        for route in app.routes
        for handler in getattr(route, "route_handlers", [])
        if isinstance(handler, HTTPRouteHandler)
        for method in handler.http_methods
    }
    paths = _plain(app.openapi_schema.to_schema()["paths"])
    for path, operations in paths.items():
        for method, operation in operations.items():
            _complete(operation, path, method.upper(), handlers[path, method.upper()])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "The coordinator of a fleet",
            "version": "1",
            "description": "What a coordinator can be asked, on its socket without a token, over the network with one. See api.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(handler for handler in handlers.values()),
            "responses": {str(s): _failure(s) for s in FAILURES},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "NAME.SECRET, of `edge-agent tokens new`."}},
        },
    }


def _complete(operation: Schema, path: str, method: str, handler: HTTPRouteHandler) -> None:
    """Say what litestar does not know of an operation: its scope, and its answers to what fails."""
    operation["operationId"] = handler.handler_name
    operation["summary"], operation["description"] = operation["description"], f"Takes the scope `{handler.opt['scope']}`."
    operation["security"] = [{"token": [handler.opt["scope"]]}]
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = _if_given(parameter["schema"])
    if handler.handler_name in BODIES:
        operation["requestBody"] = {"required": True, "content": {BODIES[handler.handler_name]: {}}}
    asked = {parameter["in"] for parameter in operation.get("parameters", ())}
    statuses = {*EVERY_STATUS, *handler.opt.get("statuses", ())}
    statuses |= {404} if "path" in asked else set()
    statuses |= {413} if method in ("POST", "PUT") else set()
    statuses |= {409} if method != "GET" else set()
    operation["responses"].pop("400", None)
    operation["responses"] |= {str(s): {"$ref": f"#/components/responses/{s}"} for s in sorted(statuses)}
    for status in (200, 206):
        if (given := FILES.get(handler.handler_name)) and str(status) in operation["responses"]:
            operation["responses"][str(status)] = {"description": HTTPStatus(status).phrase, "content": {given: {}}}


def _if_given(schema: Schema) -> Schema:
    """Return the schema of a parameter where it is given: litestar has null among its alternatives, and bounds beside them."""
    bounds = {name: value for name, value in schema.items() if name != "oneOf"}
    given = [part for part in schema.get("oneOf", ()) if part.get("type") != "null"]
    return bounds | (given[0] if len(given) == 1 else {"oneOf": given} if given else {})


def _failure(status: int) -> Schema:
    if status == 304:
        return {"description": "Not Modified"}
    return {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM: {"schema": {"$ref": REFERENCE.format(name=Problem.__name__)}}},
    }


def _schemas(handlers: Any) -> Schema:
    """Return the schemas of all that requests and answers hold."""
    kinds: list[Any] = [Problem]
    for handler in handlers:
        signature = handler.parsed_fn_signature
        kinds += [signature.return_type.annotation]
        kinds += [parameter.annotation for name, parameter in signature.parameters.items() if name == "data"]
    structs = [kind for kind in kinds for kind in (kind, *getattr(kind, "__args__", ())) if isinstance(kind, type(msgspec.Struct))]
    _, schemas = msgspec.json.schema_components(structs, ref_template=REFERENCE)
    return {name: _portable(_plain(schemas[name])) for name in sorted(schemas)}


def _portable(schema: Any) -> Any:
    """Write patterns as every reader of JSON Schema takes them: `\\Z` is Python's."""
    if isinstance(schema, list):
        return [_portable(item) for item in schema]
    if isinstance(schema, dict):
        return {
            name: value.replace("\\Z", "$") if name == "pattern" and isinstance(value, str) else _portable(value)
            for name, value in schema.items()
        }
    return schema


def _plain(value: Any) -> Any:
    """Return what JSON has of a value; nothing in it is shared, so YAML writes no anchors."""
    return msgspec.json.decode(msgspec.json.encode(value))


def main() -> None:
    """Print the document as YAML."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise SystemExit("the document is written with PyYAML; install it: pip install 'edge-agent[dev]'") from None
    sys.stdout.write(yaml.safe_dump(_plain(document()), sort_keys=False, allow_unicode=True, width=140))


if __name__ == "__main__":
    main()
