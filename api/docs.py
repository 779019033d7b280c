"""The documentation page at /docs, rendered from this application's own OpenAPI document. One page, no script, nothing from elsewhere.

Swagger UI and ReDoc load theirs from a CDN; a GPU host without a way out would show an empty page. Knows no operation by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic.json_schema import models_json_schema

from api.examples import problem_kinds, restore_nulls
from api.problems import Problem
from headrace.schemas import BatchCreate

_REF = "#/components/schemas/"
# The browser itself checks that nothing comes from elsewhere, and a batch's text could never run as a script here.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

_QUICKSTART = (
    (
        "curl",
        """BATCHES={base}/v1/batches
curl -s $BATCHES \\
  -H 'Content-Type: application/json' \\
  -d '{"prompts": ["Name three rivers in France."],
       "gen_config": {"max_new_tokens": 64}}'

curl -s $BATCHES/batch_…
curl -s $BATCHES/batch_…/results.jsonl""",
    ),
    (
        "Python",
        """from headrace import Client, GenerationConfig

client = Client("{base}")
batch = client.submit(
    ["Name three rivers in France."],
    GenerationConfig(max_new_tokens=64),
)
client.wait(batch.id)
for completion in client.results(batch.id):
    print(completion.choices[0].text)""",
    ),
    (
        "openai",
        """from openai import OpenAI

client = OpenAI(
    base_url="{base}/v1",
    api_key="none")
file = client.files.create(
    file=open("requests.jsonl", "rb"),
    purpose="batch")
batch = client.batches.create(
    input_file_id=file.id,
    endpoint="/v1/chat/completions",
    completion_window="24h")
batch = client.batches.retrieve(batch.id)
client.files.content(batch.output_file_id)""",
    ),
)


@cache
def version() -> str:
    """Return the installed version; a checkout that was never installed has none."""
    try:
        return package_version("headrace")
    except PackageNotFoundError:
        return "0.0.0"


def install(app: FastAPI) -> None:
    """Serve /docs, and put the shapes that handlers parse themselves into /openapi.json."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generated()
            _, definitions = models_json_schema(
                [(BatchCreate, "validation"), (Problem, "serialization")], ref_template=_REF + "{model}"
            )
            document["components"]["schemas"] |= definitions["$defs"]
            document = restore_nulls(document)
            _drop_foreign_errors(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        return Response(
            render(openapi(), base=str(request.base_url).rstrip("/")),
            media_type="text/html",
            headers={"content-security-policy": _POLICY},
        )

    @app.get("/", include_in_schema=False)
    def root() -> Response:
        return Response(status_code=307, headers={"location": "/docs"})


def _drop_foreign_errors(document: dict[str, Any]) -> None:
    """Remove FastAPI's own form of validation errors: an operation that can answer 422 says so itself, with a problem."""
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    for methods in document["paths"].values():
        for operation in methods.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]


def render(document: Mapping[str, Any], *, base: str) -> str:
    """Return the HTML page of an OpenAPI document; `base`: the URL under which the reader reached this server."""
    info = document["info"]
    groups: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            groups.setdefault(operation["tags"][0], []).append((method, path, operation))
    schemas = document["components"]["schemas"]
    sections = "".join(
        f'<section><h2 id="{_slug(tag)}">{escape(tag)}</h2>{"".join(_operation(*found, schemas) for found in operations)}</section>'
        for tag, operations in groups.items()
    )
    css = (Path(__file__).parent / "docs.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title><style>{css}</style></head><body><div class=page>{_navigation(info, groups)}<main>"
        f"<h1>{escape(info['title'])} API</h1><p class=lead>{escape(info.get('summary', ''))} "
        'The machine-readable form of this page is <a href="/openapi.json">/openapi.json</a>.</p>'
        f"{_start(base)}{sections}{_config_section(schemas)}{_problem_section()}</main></div></body></html>"
    )


def _navigation(info: Mapping[str, Any], groups: Mapping[str, list[tuple[str, str, dict[str, Any]]]]) -> str:
    lists = "".join(
        f"<h2>{escape(tag)}</h2><ul>"
        + "".join(
            f'<li><a href="#{_slug(method + path)}"><span class="method {method}">{method.upper()}</span>{escape(operation["summary"])}</a></li>'
            for method, path, operation in operations
        )
        + "</ul>"
        for tag, operations in groups.items()
    )
    more = '<h2>Reference</h2><ul><li><a href="#generation-config">GenerationConfig</a></li><li><a href="#problems">Problems</a></li></ul>'
    return (
        f"<nav><div class=brand>{escape(info['title'])}<span class=version>{escape(info['version'])}</span></div>"
        f'<h2>Start</h2><ul><li><a href="#quickstart">Quickstart</a></li></ul>{lists}{more}</nav>'
    )


def _start(base: str) -> str:
    blocks = "".join(f"<div><h3>{name}</h3>{_pre(code.replace('{base}', base))}</div>" for name, code in _QUICKSTART)
    return (
        '<section><h2 id="quickstart">Quickstart</h2><p>Submit prompts, look at the batch until it is over, read the completions. '
        "What was accepted with 202 is in the database and is answered, whatever is restarted in between.</p>"
        f"<div class=tabs>{blocks}</div></section>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    body = _prose(operation.get("description", ""))
    if parameters := operation.get("parameters"):
        rows = (
            (
                item["name"],
                item["schema"],
                item.get("description") or item["schema"].get("description", ""),
                item.get("required", False),
                item["in"],
            )
            for item in parameters
        )
        body += "<h4>Parameters</h4>" + _fields(rows, schemas)
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content:
        body += "<h4>Body</h4>" + _schema_table(content["schema"]["$ref"].removeprefix(_REF), schemas)
        for example in content.get("examples", {}).values():
            body += f"<details><summary>Example: {escape(example['summary'])}</summary>{_json(example['value'])}</details>"
    body += "<h4>Responses</h4>" + _responses(operation["responses"])
    return (
        f'<article id="{_slug(method + path)}"><header><span class="method {method}">{method.upper()}</span><code class=path>{escape(path)}</code>'
        f"<span class=summary>{escape(operation['summary'])}</span></header><div>{body}</div></article>"
    )


def _responses(responses: Mapping[str, Any]) -> str:
    """Return a fold for each reply that has an example, and one table for the problems, which all look alike."""
    folds, rows = "", ""
    for status, response in sorted(responses.items()):
        colour = "ok" if status.startswith("2") else "bad"
        head = f'<span class="status {colour}">{status}</span>'
        shown = [(kind, content["example"]) for kind, content in response.get("content", {}).items() if "example" in content]
        if shown:
            kind, example = shown[0]
            block = _pre(example) if isinstance(example, str) else _json(example)
            folds += (
                f"<details><summary>{head}{_inline(response['description'])} <code>{kind}</code></summary>{block}</details>"
            )
        else:
            rows += f"<tr><td>{head}</td><td>{_inline(response['description'])}</td></tr>"
    return folds + (f"<table class=problems>{rows}</table>" if rows else "")


def _schema_table(name: str, schemas: Mapping[str, Any]) -> str:
    schema = schemas[name]
    required = schema.get("required", [])
    rows = ((key, field, field.get("description", ""), key in required, None) for key, field in schema["properties"].items())
    return _fields(rows, schemas)


def _fields(rows: Iterable[tuple[str, Mapping[str, Any], str, bool, str | None]], schemas: Mapping[str, Any]) -> str:
    out = []
    for name, schema, description, required, place in rows:
        mark = "<span class=required>required</span>" if required else ""
        where = f" · {place}" if place else ""
        default = schema.get("default")
        unset = default is None or default == []
        rest = "" if unset or required else f" Default: <code>{escape(json.dumps(default))}</code>."
        out.append(
            f"<tr><td><code>{escape(name)}</code>{mark}</td><td class=type>{_type(schema, schemas)}{where}</td><td>{_inline(description)}{rest}</td></tr>"
        )
    return f"<table><tr><th>Name</th><th>Type</th><th>Meaning</th></tr>{''.join(out)}</table>"


def _type(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """Return a short name of a schema's type."""
    if ref := schema.get("$ref"):
        name = ref.removeprefix(_REF)
        if "enum" in schemas.get(name, {}):
            return _type(schemas[name], schemas)
        return f'<a href="#generation-config">{name}</a>' if name == "GenerationConfig" else escape(name)
    if options := schema.get("anyOf"):
        return " or ".join(_type(option, schemas) for option in options)
    if values := schema.get("enum"):
        return " · ".join(escape(str(value)) for value in values)
    if schema.get("type") == "array":
        items = schema.get("items") or {}
        inner = "pairs" if "prefixItems" in items else _type(items, schemas) if items else "anything"
        return f"list of {inner}" if " or " not in inner else f"list of ({inner})"
    return (
        escape(schema.get("title", "object"))
        if schema.get("type") == "object" and "properties" in schema
        else escape(schema.get("type", "any"))
    )


def _config_section(schemas: Mapping[str, Any]) -> str:
    schema = schemas["GenerationConfig"]
    return (
        f'<section><h2 id="generation-config">GenerationConfig</h2>{_prose(schema["description"])}'
        f"{_schema_table('GenerationConfig', schemas)}</section>"
    )


def _problem_section() -> str:
    rows = "".join(
        f'<tr id="problem-{code}"><td><code>{code}</code></td><td class=type>{status}</td><td>{_inline(meaning)}</td></tr>'
        for code, status, meaning in problem_kinds()
    )
    return (
        '<section><h2 id="problems">Problems</h2><p>Every error is <code>application/problem+json</code> (RFC 9457) with '
        "<code>code</code>, <code>status</code>, <code>detail</code>, the offending <code>param</code> or prompt <code>index</code>, "
        "<code>errors</code> where there are several, and the <code>request_id</code> that the log has too; <code>error</code> is OpenAI's form of the "
        "same. A prompt that fails alone "
        "carries the same codes in its completion's <code>error</code>.</p>"
        f"<table><tr><th>Code</th><th>Status</th><th>Meaning</th></tr>{rows}</table></section>"
    )


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in text.split("\n\n") if part.strip())


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _json(value: Any) -> str:
    return _pre(json.dumps(value, indent=2, ensure_ascii=False))


def _pre(text: str) -> str:
    return f"<pre><code>{escape(text, quote=False)}</code></pre>"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
