"""The public API: the example of `docs/library.md`, and that cached, restored and cold chats say the same."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

import kvchat
from kvchat import Answer, Chat, KvchatError, Model, Sampling, load
from kvchat.chat.store import Store
from kvchat.config.paths import find_paths

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(max_tokens=6)
QUESTIONS = ("Which pass is open in May?", "How long is the drive?", "And the train?")
SYSTEM = "You answer in one word."


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Iterator[Model]:
    with opened(tiny_folder, tmp_path) as found:
        yield found


def opened(folder: Path, data: Path, context: int | None = None) -> Model:
    return load(folder, precision="fp32", threads=1, draft="off", data_dir=data / "data", context=context)


def asked(model: Model, questions: tuple[str, ...], *, mode: str = "on") -> tuple[Chat, list[Answer]]:
    chat = model.chat(SYSTEM, sampling=GREEDY, mode=mode)
    return chat, [chat.ask(question) for question in questions]


def token_ids(chat: Chat) -> list[tuple[int, ...]]:
    """Of every answer that is shown."""
    return [message.token_ids for message in chat.conversation.messages if message.role == "assistant"]


# ---- the example ----------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert 10 <= len([line for line in example.splitlines() if line]) <= 15
    assert not re.search(r"\b_|\._", example), "something private is needed"
    monkeypatch.chdir(tmp_path)
    used: dict[str, object] = {}
    exec(example.replace('"smollm2-135m-instruct"', f"{str(tiny_folder)!r}, precision='fp32'"), used)
    chat, restored, edited = used["chat"], used["restored"], used["edited"]
    assert isinstance(chat, Chat)
    assert isinstance(restored, Chat)
    assert isinstance(edited, Answer)
    lines = capsys.readouterr().out.splitlines()
    assert f"{edited.stats.reused_tokens} tokens reused, {edited.stats.prefilled_tokens} read" in lines
    assert edited.stats.reused_tokens > edited.stats.prefilled_tokens > 0
    assert restored.answer
    assert restored.answer.stats.reused_tokens > edited.stats.prompt_tokens
    asked = [m.text for m in restored.conversation.messages if m.role == "user"]
    assert asked == ["Name three rivers of Europe.", "Which of them is the shortest?", "Why?"]


def test_every_public_name_is_the_one_that_is_typed() -> None:
    source = (ROOT / "kvchat" / "__init__.py").read_text(encoding="utf-8")
    imports = source.partition("if TYPE_CHECKING:")[2].partition("__all__")[0]
    modules = re.findall(r"from (\S+) import (?:\(([^)]*)\)|(.*))", imports)
    typed = {name: module for module, *names in modules for name in re.findall(r"\w+", " ".join(names))}
    assert sorted(typed) == sorted(kvchat.__all__) == dir(kvchat)
    assert all(getattr(import_module(typed[name]), name) is getattr(kvchat, name) for name in typed)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvchat.nothing  # noqa: B018


def test_importing_kvchat_is_cheap() -> None:
    code = "import sys, kvchat; kvchat.KvchatError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "transformers", "textual", "sqlite_utils", "kvchat.library", "kvchat.engine"}
    assert not heavy & {*done.stdout.split()}
    code = "import sys, kvchat; kvchat.load; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "transformers", "textual"} & {*done.stdout.split()}


def test_types_are_declared() -> None:
    assert (ROOT / "kvchat" / "py.typed").is_file()


# ---- equal answers --------------------------------------------------------------------------------------


def test_restored_is_live_is_cold(model: Model, tiny_folder: Path, tmp_path: Path) -> None:
    live, _ = asked(model, QUESTIONS[:2])
    live.save(tmp_path / "saved")
    cold, cold_answers = asked(model, QUESTIONS, mode="off")
    went_on = live.ask(QUESTIONS[2])
    with opened(tiny_folder, tmp_path) as other:
        restored = other.restore(tmp_path / "saved")
        assert (restored.cache.tokens, restored.conversation.system_prompt) == (
            went_on.stats.reused_tokens,
            SYSTEM,
        )
        again = restored.ask(QUESTIONS[2])
        assert token_ids(restored) == token_ids(live) == token_ids(cold)
        assert again.stats.reused_tokens == went_on.stats.reused_tokens > 0
        assert again.stats.prefilled_tokens == went_on.stats.prefilled_tokens
    assert again.text == went_on.text == cold_answers[2].text
    assert cold_answers[2].stats.reused_tokens == 0
    assert any(token_ids(cold))


def test_an_edited_question_reuses_what_stands_before_it_and_is_answered_as_if_asked_first(
    model: Model,
) -> None:
    chat, answers = asked(model, QUESTIONS[:2])
    edited = chat.edit(2, QUESTIONS[2])
    fresh, expected = asked(model, (QUESTIONS[0], QUESTIONS[2]), mode="off")
    assert token_ids(chat) == token_ids(fresh)
    assert edited.text == expected[1].text
    first = answers[0].stats
    assert first.prompt_tokens < edited.stats.reused_tokens < edited.stats.prompt_tokens
    assert chat.answer == edited
    assert chat.regenerate().text == edited.text


def test_a_stream_is_the_same_answer_in_pieces(model: Model) -> None:
    _, (whole,) = asked(model, QUESTIONS[:1], mode="off")
    chat = model.chat(SYSTEM, sampling=GREEDY)
    pieces = list(chat.stream(QUESTIONS[0]))
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text
    assert chat.answer
    assert chat.answer.text == whole.text


def test_the_cache_is_counted_and_mapped(model: Model) -> None:
    chat = model.chat(SYSTEM, sampling=GREEDY)
    assert (chat.cache.tokens, chat.cache.bytes) == (0, 0)
    stats = chat.ask(QUESTIONS[0]).stats
    found = chat.cache.map()
    assert (chat.cache.tokens, chat.cache.bytes) == (stats.kv_tokens, stats.kv_bytes)
    assert sum(block.tokens for block in found.blocks) == stats.kv_tokens
    assert found.bytes == stats.kv_bytes
    assert sum(group.layers for group in found.layers) == model.facts.layers


# ---- what goes wrong ------------------------------------------------------------------------------------


def test_a_stream_that_is_left_stops_its_turn_and_keeps_what_was_written(model: Model) -> None:
    chat = model.chat(SYSTEM, sampling=Sampling(max_tokens=100))
    stream = chat.stream(QUESTIONS[0])
    first = next(stream)
    with pytest.raises(KvchatError, match="Another answer of this model is being written"):
        model.chat().ask("?")
    with pytest.raises(KvchatError, match="Another answer"):
        chat.save("nowhere")
    stream.close()
    assert chat.answer
    assert chat.answer.stats.finish_reason == "cancelled"
    assert chat.answer.text.startswith(first)
    assert chat.ask(QUESTIONS[1]).stats.reused_tokens > 0


def test_a_failed_turn_is_a_sentence_and_leaves_no_trace_in_later_prompts(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with opened(tiny_folder, tmp_path, context=64) as model:
        chat = model.chat(sampling=GREEDY)
        before = chat.ask("Why?")
        with pytest.raises(KvchatError, match="64"):
            chat.ask("Which pass is open? " * 40)
        after = chat.ask("And the train?")
        assert after.stats.reused_tokens > before.stats.prompt_tokens
        assert len(chat.conversation.prompt()) == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "maybe"}, "'maybe' is not a valid CacheMode"),
        ({"kv": "int2"}, "'int2' is not a valid KVPrecision"),
        ({"policy": "random"}, "'random' is not a valid EvictionPolicy"),
        ({"sampling": Sampling(temperature=-1)}, "temperature must be at least 0"),
        ({"system": "\udcff"}, "The system prompt is not text"),
    ],
)
def test_settings_that_do_not_exist_are_refused(model: Model, given: dict[str, str], words: str) -> None:
    with pytest.raises(KvchatError, match=re.escape(words)):
        model.chat(**given)  # type: ignore[arg-type]


def test_questions_that_are_none_are_refused(model: Model) -> None:
    chat, _ = asked(model, QUESTIONS[:1])
    calls: tuple[tuple[Callable[[], Answer], str], ...] = (
        (lambda: chat.ask(" "), "The question is empty."),
        (lambda: chat.ask("\udcff"), "The question is not text"),
        (lambda: chat.edit(2, "What?"), "There is no question 2"),
        (lambda: model.chat().regenerate(), "no answer to write again"),
    )
    for call, words in calls:
        with pytest.raises(KvchatError, match=re.escape(words)):
            call()
    assert len(chat.conversation.messages) == 2


def test_a_folder_holds_several_chats_and_a_later_save_replaces_the_earlier_one(
    model: Model, tmp_path: Path
) -> None:
    first, _ = asked(model, QUESTIONS[:1])
    second, _ = asked(model, QUESTIONS[1:2])
    folder = tmp_path / "saved"
    first.save(folder)
    second.save(folder)
    assert model.restore(folder).conversation.id == second.conversation.id
    first.edit(1, QUESTIONS[2])
    first.save(folder)
    restored = model.restore(folder, first.conversation.id[:8])
    assert token_ids(restored) == token_ids(first)
    assert restored.cache.tokens == first.cache.tokens > 0
    assert restored.answer == first.answer
    store = Store(find_paths(folder).database)
    assert len(store.summaries()) == 2
    assert len(store.whole(store.load(first.conversation.id)).other_branches) == 2
    store.close()


def test_a_cache_that_does_not_fit_is_left_out_and_the_next_turn_says_why(
    model: Model, tiny_folder: Path, tmp_path: Path
) -> None:
    chat, _ = asked(model, QUESTIONS[:1])
    chat.save(tmp_path / "saved")
    expected = chat.ask(QUESTIONS[1])
    (segment,) = (tmp_path / "saved" / "kv").rglob("*.safetensors")
    damaged = bytearray(segment.read_bytes())
    damaged[-1] ^= 1
    segment.write_bytes(damaged)
    with opened(tiny_folder, tmp_path) as other:
        restored = other.restore(tmp_path / "saved")
        assert restored.cache.tokens == 0
        answer = restored.ask(QUESTIONS[1])
        assert answer.text == expected.text
        assert answer.stats.reused_tokens == 0
        assert "damaged" in answer.stats.reuse_note


def test_a_folder_without_a_chat_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(KvchatError, match=r"No chat is saved in .*: there is no kvchat.db in it"):
        model.restore(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(KvchatError, match="There is no model 'nothing'"):
        load("nothing")
