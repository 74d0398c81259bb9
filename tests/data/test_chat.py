"""Chat templates against transformers' `apply_chat_template`, text and tokens.

The fixture (tests/fixtures/make_chat.py) holds what transformers renders, from the
templates of released models, which our own must equal, and from templates that use
what the engine offers.
"""

import functools
import json
import shutil

import pytest

from deepseek_jax.data.chat import OPENING, R1, V3, ChatTemplate, ChatTokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from tests.data.corpora import make_gpt2_file
from tests.fixtures import weights

FOLDER = weights.FOLDER / "hf_tiny_v3"
CASES = json.loads((weights.FOLDER / "chat.json").read_text("utf-8"))["cases"]
PUBLISHED = [case for case in CASES if "published" in case]
OTHERS = [case for case in CASES if "template" in case]
USER = {"role": "user", "content": "Hello"}


@functools.cache
def chat(template: str | None = None) -> ChatTokenizer:
  return ChatTokenizer.from_folder(FOLDER, template)


def test_our_templates_are_those_of_released_models():
  assert len({case["published"] for case in PUBLISHED}) == 3
  for case in PUBLISHED:
    ours = chat(R1 if "R1" in case["published"] else V3)
    assert ours.template.render(case["messages"], **case["options"]) == case["text"]
    assert ours.encode(case["messages"], **case["options"]) == case["ids"]


def test_templates_run_as_in_transformers():
  assert len({case["template"] for case in OTHERS}) == 5
  for case in OTHERS:
    options = dict(case["options"])
    ours = chat(case["template"])
    assert ours.template.render(case["messages"], **options) == case["text"]
    assert ours.encode(case["messages"], **options) == case["ids"]


def test_the_folders_own_template(tmp_path):
  """In tokenizer_config.json, one text or several; chat_template.jinja goes first."""
  for file in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(FOLDER / file, tmp_path / file)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))

  def render(**changes) -> str:
    text = json.dumps({**settings, **changes})
    (tmp_path / "tokenizer_config.json").write_text(text)
    return ChatTokenizer.from_folder(tmp_path).template.render([USER])

  begin = "<｜begin▁of▁sentence｜>"
  assert render() == f"{begin}<｜User｜>Hello<｜Assistant｜>"
  several = [
    {"name": "tool_use", "template": "t"},
    {"name": "default", "template": "d"},
  ]
  assert render(chat_template=several) == "d"
  with pytest.raises(ValueError, match="no template named default"):
    render(chat_template=several[:1])
  with pytest.raises(ValueError, match="no chat template"):
    render(chat_template=None)
  with pytest.raises(ValueError, match="is not a text"):
    render(chat_template=3)
  (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file\n")
  assert render() == f"{begin}file"
  assert render(bos_token="<think>") == "<think>file"


def test_special_tokens_are_those_of_the_folder(tmp_path):
  """tokenizer_config.json decides, not the order of names that we know."""
  shutil.copy(FOLDER / "tokenizer.json", tmp_path / "tokenizer.json")
  settings = {"bos_token": "<｜User｜>", "eos_token": {"content": "</think>"}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  tokenizer = ChatTokenizer.from_folder(tmp_path, V3).tokenizer
  plain = Tokenizer.from_file(FOLDER / "tokenizer.json")
  assert (plain.bos, plain.eos, plain.pad) == (0, 1, 2)
  assert (tokenizer.bos, tokenizer.eos) == (6, 9)
  assert tokenizer.pad == 2  # not said there, so by its name
  settings = {"eos_token": "<nothing>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match="no token '<nothing>', its eos token"):
    ChatTokenizer.from_folder(tmp_path, V3)


def test_earlier_reasoning_is_removed_and_the_next_opened():
  messages = [
    USER,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"},
    USER,
  ]
  v3, r1 = chat(V3).template.render(messages), chat(R1).template.render(messages)
  assert "hm" not in v3
  assert "<｜Assistant｜>\n\nHi<｜end▁of▁sentence｜><｜User｜>" in v3
  assert r1 == v3 + OPENING
  assert chat(V3).template.render(messages, open_thinking=True) == r1
  assert chat(R1).template.render(messages, open_thinking=True) == r1  # once
  ids = chat(R1).encode(messages)
  assert chat().tokenizer.decode(ids[-2:]) == OPENING
  with pytest.raises(ValueError, match="open_thinking"):
    chat(R1).template.render(messages, open_thinking=True, add_generation_prompt=False)


REFUSED = {
  "a tool": (V3, [{"role": "tool", "content": "1"}], "without tools"),
  "a call": (
    V3,
    [{"role": "assistant", "content": "", "tool_calls": [1]}],
    "without tools",
  ),
  "its own words": ("{{ raise_exception('no\nno') }}", [USER], "no no"),
  "nothing there": ("{{ messages[3].content }}", [USER], "has no element 3"),
  "wrong types": ("{{ 1 + messages }}", [USER], "unsupported operand"),
  "private names": ("{{ messages.__class__.__mro__ }}", [USER], "unsafe"),
  "writing": ("{{ messages.append(1) }}", [USER], "is unsafe"),
  "endless": ("{% for i in range(10**9) %}{% endfor %}", [USER], "Range too big"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_line(what):
  source, messages, complaint = REFUSED[what]
  template = ChatTemplate(source, {"bos_token": "", "eos_token": ""}, "a file")
  with pytest.raises(ValueError, match="the chat template of a file: ") as error:
    template.render(messages)
  assert complaint in str(error.value)
  assert "\n" not in str(error.value)


def test_what_cannot_be_read(tmp_path):
  with pytest.raises(ValueError, match="a file is not Jinja"):
    ChatTemplate("{% if %}", {}, "a file")
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
    ChatTokenizer.from_folder(tmp_path, V3)
  (tmp_path / "tokenizer_config.json").write_text("[]")
  with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
    ChatTokenizer.from_folder(tmp_path, V3)
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}')
  with pytest.raises(ValueError, match="eos_token is not a text"):
    ChatTokenizer.from_folder(tmp_path, V3)


def test_our_templates_need_their_special_tokens(tmp_path):
  make_gpt2_file(tmp_path / "tokenizer.json", ["<|endoftext|>"])
  with pytest.raises(ValueError, match="<｜User｜>"):
    ChatTokenizer.from_folder(tmp_path, R1)
  other = ChatTokenizer.from_folder(tmp_path, "{{ messages[0].content }}")
  assert other.tokenizer.decode(other.encode([USER])) == "Hello"
