"""Makes requests from the templates in prompts.yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import best_match

from data_pipeline.commands import one_line
from data_pipeline.synthesis.config import ROLES, EndpointConfig

TEMPLATES = Path(__file__).with_name("prompts.yaml")
KINDS = ("caption", "confirm", "write", "audit", "say", "same")
_VERSION = 1  # of a request's form: part of its key


class PromptError(ValueError):
    """A file of templates that cannot be used; the text says where and what is missing."""


@dataclass(frozen=True)
class Request:
    """A question to a model."""

    kind: str  # one of KINDS, or another word for errors
    url: str
    model: str
    system: str  # the system message; "": none
    content: tuple[dict[str, Any], ...]  # OpenAI's parts of the user's message
    schema: Mapping[str, Any] | None  # JSON schema of the reply; None: the reply is a text
    validator: Draft202012Validator | None  # of the schema
    temperature: float
    max_tokens: int
    seed: int
    key: str  # hash of the question, the model and the seed, not of the server's address
    tokens: int  # of the prompt, estimated

    def check(self, reply: Any) -> None:
        """Raises ValueError for a reply that the schema does not allow, and for one with half a
        surrogate pair, which JSON can spell and nothing can store."""
        json.dumps(reply, ensure_ascii=False).encode()
        wrong = self.validator and best_match(self.validator.iter_errors(reply))
        if wrong is not None:
            place = "/".join(map(str, wrong.absolute_path))
            raise ValueError(f"{place or 'reply'}: {wrong.message:.200}")


@dataclass(frozen=True)
class Prompts:
    """The templates of a file; tasks, schemas and validators by kind, roles' instructions by
    role."""

    text: str  # the whole file, for fingerprints
    system: str
    tasks: Mapping[str, str]
    schemas: Mapping[str, Mapping[str, Any]]
    validators: Mapping[str, Draft202012Validator]
    roles: Mapping[str, str]

    def request(
        self,
        kind: str,
        data: Mapping[str, Any],
        config: EndpointConfig,
        seed: int = 0,
        frames: Sequence[tuple[int, str]] = (),
    ) -> Request:
        """The request of a kind with `data` as JSON; `frames`: (second, `data:` URL) of each."""
        url, model = (config.url, config.model) if frames else config.of_text()
        # Frames before the data: requests about one clip then begin alike, and servers that keep
        # prefixes read a frame once.
        content: list[dict[str, Any]] = [{"type": "text", "text": self.tasks[kind]}]
        for second, picture in frames:
            content.append({"type": "text", "text": f"second {second}:"})
            content.append({"type": "image_url", "image_url": {"url": picture}})
        content.append({"type": "text", "text": json.dumps(data, ensure_ascii=False)})
        schema = self.schemas[kind]
        identity = [_VERSION, model, self.system, content, schema, config.temperature, seed]
        digest = hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode())
        letters = len(self.system) + sum(len(part.get("text", "")) for part in content)
        tokens = letters // 4 + len(frames) * config.image_tokens
        return Request(
            kind, url, model, self.system, tuple(content), schema, self.validators[kind],
            config.temperature, config.max_tokens, seed, digest.hexdigest(), tokens,
        )  # fmt: skip


def load_prompts(path: Path | None = None) -> Prompts:
    """The templates of a file (None: prompts.yaml beside this module). Raises PromptError."""
    file = path or TEMPLATES
    try:
        text = file.read_text()
        data = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PromptError(f"{file}: cannot be read: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise PromptError(f"{file}: expected system, roles and {', '.join(KINDS)}")
    tasks, schemas = {}, {}
    for kind in KINDS:
        entry = data.get(kind)
        entry = entry if isinstance(entry, dict) else {}
        task, schema = entry.get("task"), entry.get("schema")
        if not isinstance(task, str) or not isinstance(schema, dict):
            raise PromptError(f"{file}: {kind}: needs a task (a text) and a schema (JSON Schema)")
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise PromptError(f"{file}: {kind}.schema: {error.message}") from None
        tasks[kind], schemas[kind] = task.strip(), schema
    roles, system = data.get("roles"), data.get("system")
    if not isinstance(system, str):
        raise PromptError(f"{file}: system: is not a text")
    for role in ROLES:
        if not isinstance(roles, dict) or not isinstance(roles.get(role), str):
            raise PromptError(f"{file}: roles.{role}: is not a text")
    assert isinstance(roles, dict)
    by_role = {role: roles[role].strip() for role in ROLES}
    validators = {kind: Draft202012Validator(schema) for kind, schema in schemas.items()}
    return Prompts(text, system.strip(), tasks, schemas, validators, by_role)
