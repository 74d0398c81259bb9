"""Conversations as prompts: tokenizer folders and their chat templates.

A Hugging Face folder says in `chat_template.jinja` or in `tokenizer_config.json` how
messages become text. DeepSeek's layout: begin of sentence, system text; then for each
turn `<｜User｜>`, message, `<｜Assistant｜>`, reply, end of sentence. Of earlier
replies R1 keeps what follows `</think>`, and a new one is to open with `<think>` and a
line break (README of the R1 repository).

Templates run in Jinja's immutable sandbox, with the settings, filters and functions
that transformers gives them. Left out in the templates written here: tools, which
differ between releases; folders bring their own.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Never

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_jax.data.tokenizer import Tokenizer

OPENING = "<think>\n"  # what R1's replies begin with
MARKS = ("<｜User｜>", "<｜Assistant｜>")
V3 = (
  "{{ bos_token }}"
  "{{ messages | selectattr('role', 'equalto', 'system')"
  " | map(attribute='content') | join('\\n\\n') }}"
  "{% for message in messages if message.role != 'system' %}"
  "{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
  "{% elif message.role == 'assistant' and not message.tool_calls %}"
  "<｜Assistant｜>{{ message.content.split('</think>') | last }}{{ eos_token }}"
  "{% else %}{{ raise_exception('messages are of system, user or assistant, without "
  "tools') }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
R1 = V3 + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "pad"}

Message = Mapping[str, Any]  # role and content


class _Generation(Extension):
  """`{% generation %}` marks replies for training masks; here it changes nothing."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Parser) -> list[nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
  """A Jinja template over messages, and the special tokens it names.

  Raises:
    ValueError: at construction, if `template` is not Jinja; `where` says whose it is.
  """

  def __init__(self, template: str, tokens: Mapping[str, str], where: str = "template"):
    """`tokens`: texts of bos_token, eos_token and so on, for the template's use."""
    self.source, self.where, self.tokens = template, where, dict(tokens)
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
      self._compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
      raise ValueError(f"the chat template of {where} is not Jinja: {error}") from None

  def render(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    open_thinking: bool = False,
    **variables: Any,
  ) -> str:
    """The conversation as text.

    Args:
      messages: each with `role` (system, user or assistant) and `content`.
      add_generation_prompt: whether a reply of the assistant is to follow.
      open_thinking: ends the prompt with `OPENING`, if the template does not.
      variables: others that the template knows (`tools`, `thinking`).

    Raises:
      ValueError: the template refuses the messages, or fails on them.
    """
    if open_thinking and not add_generation_prompt:
      raise ValueError("open_thinking=True needs add_generation_prompt=True")
    given = {"tools": None, "documents": None} | variables
    try:
      text = self._compiled.render(
        **self.tokens,
        **given,
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
      )
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
      line = " ".join(str(error).split())
      raise ValueError(f"the chat template of {self.where}: {line}") from None
    opened = text.endswith(OPENING) or not open_thinking
    return text if opened else text + OPENING


class ChatTokenizer:
  """A tokenizer with its chat template.

  Attributes:
    tokenizer: of texts; its `eos` ends a reply.
    template: of conversations.
  """

  def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
    self.tokenizer, self.template = tokenizer, template

  @classmethod
  def from_folder(
    cls, folder: str | os.PathLike[str], template: str | None = None
  ) -> "ChatTokenizer":
    """Reads tokenizer.json, tokenizer_config.json and the chat template.

    Args:
      folder: a Hugging Face folder, or one with these files only.
      template: Jinja to use instead of the folder's, as `V3` or `R1`.

    Raises:
      FileNotFoundError: no tokenizer.json there.
      ValueError: files that cannot be read, no template in the folder and none given,
        or one of ours for a tokenizer without its special tokens.
    """
    path = Path(folder)
    tokenizer, known = _load(path)
    source = folder_template(path) if template is None else template
    if source is None:
      raise ValueError(
        f"{path} has no chat template: put a chat_template.jinja there, or give one, "
        "as deepseek_jax.data.chat.R1"
      )
    if template in (V3, R1):
      for mark in MARKS:
        tokenizer.token_id(mark)
    return cls(tokenizer, ChatTemplate(source, known, str(path)))

  def encode(self, messages: Sequence[Message], **options: Any) -> list[int]:
    """Ids of a conversation; options as for `ChatTemplate.render`.

    Names of special tokens inside a message become these tokens, as everywhere.
    """
    return self.tokenizer.encode(self.template.render(messages, **options))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
  """tokenizer.json with the special tokens that tokenizer_config.json names.

  Without that file they are found by the names in use.

  Raises:
    FileNotFoundError, ValueError: as `ChatTokenizer.from_folder`.
  """
  return _load(Path(folder))[0]


def folder_template(folder: Path) -> str | None:
  """The folder's own template: its own file first, then tokenizer_config.json's.

  Of several named ones it is `default`.
  """
  file = folder / "chat_template.jinja"
  if file.exists():
    return file.read_text("utf-8")
  found = _settings(folder).get("chat_template")
  if isinstance(found, list):
    try:
      named = {entry["name"]: entry["template"] for entry in found}
      found = named["default"]
    except (TypeError, KeyError):
      raise ValueError(
        f"{folder}/tokenizer_config.json: chat_template has no template named default"
      ) from None
  if found is not None and not isinstance(found, str):
    raise ValueError(f"{folder}/tokenizer_config.json: chat_template is not a text")
  return found


def _load(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
  """The tokenizer, and the texts of bos_token and so on that its folder says."""
  settings = _settings(folder)
  texts = {role: _text(settings, role, folder) for role in _ROLES}
  known = {role: text for role, text in texts.items() if text is not None}
  roles = {_ROLES[role]: text for role, text in known.items()}
  return Tokenizer.from_file(folder / "tokenizer.json", roles), known


def _settings(folder: Path) -> dict[str, Any]:
  """The content of tokenizer_config.json, empty without that file."""
  path = folder / "tokenizer_config.json"
  if not path.exists():
    return {}
  try:
    settings = json.loads(path.read_text("utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(settings, dict):
    raise ValueError(f"{path} is not a JSON object")
  return settings


def _text(settings: dict[str, Any], role: str, folder: Path) -> str | None:
  """The text of a special token, which may be an object with `content`."""
  found = settings.get(role)
  if isinstance(found, dict):
    found = found.get("content")
  if found is not None and not isinstance(found, str):
    raise ValueError(f"{folder}/tokenizer_config.json: {role} is not a text")
  return found


def _to_json(
  value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
  """As transformers' `tojson`: Jinja's own escapes HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _refuse(message: str) -> Never:
  raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
  return datetime.datetime.now().strftime(layout)
