"""Conversations are checked line by line, and counted in the very tokens that are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_chat import TEMPLATE, conversation, write_jsonl, write_tokenizer

from planner.errors import PlannerError
from workloads.finetune.chat import Chat, load_chat
from workloads.finetune.check import prepare, report_on
from workloads.finetune.config import Data
from workloads.finetune.data import IGNORED, Example, Fault, Task, examples, is_evaluation, read

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return load_chat(str(write_tokenizer(tmp_path_factory.mktemp("model"))))


def only_example(path: Path, chat: Chat, task: Task = "sft", loss_on: Any = "completion") -> Example:
    (one,) = examples(read(path, task), chat, task, loss_on)
    assert isinstance(one, Example), one
    return one


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"messages": [', "not JSON: Expecting value at column 15"),
        (b"[1]", "a JSON list, not an object"),
        (b"", "the line is empty"),
        (b'\xef\xbb\xbf{"messages": []}', "begins with a byte order mark"),
        (b'{"messages": "\xff"}', "byte 15 is not UTF-8"),
        (b'{"messages": NaN}', "NaN is no JSON value"),
        (b'{"text": "Hi"}', "no `messages`, but text"),
        (b'{"messages": []}', "messages is not a list of messages"),
        (b'{"messages": [1]}', "messages[0] is not an object"),
        (
            b'{"messages": [{"role": "human", "content": "Hi"}]}',
            "messages[0] has the role 'human': use system, user",
        ),
        (b'{"messages": [{"role": "user"}]}', "messages[0] has no content"),
        (b'{"messages": [{"role": "user", "content": ["Hi"]}]}', "content that is not text"),
        (b'{"messages": [{"role": "user", "content": " \\n"}]}', "messages[0] is an empty turn of the user"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    ],
)
def test_a_line_that_cannot_be_learned_is_named_with_its_number(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "chat.jsonl"
    good = json.dumps(conversation("Hi", "Yes")).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    (fault,) = read(path, "sft").faults
    assert fault.line == 2
    assert said in fault.what
    assert str(fault).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("user", "ends with the user: there is no answer to learn"),
        ("assistant", "does not begin with the user, but with the assistant"),
        ("system", "does not begin with the user"),
        ("system assistant", "does not begin with the user, but with the assistant"),
        ("user user assistant", "a message of the user follows one of the user"),
        ("user assistant assistant", "a message of the assistant follows one of the assistant"),
        ("user system assistant", "messages[1] is a system message that does not come first"),
        ("user tool assistant", "a message of the tool follows one of the user"),
        ("user assistant user assistant", ""),
        ("system user assistant tool tool assistant", ""),
    ],
)
def test_turns_follow_each_other_as_a_template_expects(tmp_path: Path, roles: str, said: str) -> None:
    messages = [{"role": role, "content": "x"} for role in roles.split()]
    faults = read(write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}]), "sft").faults
    assert bool(faults) == bool(said)
    assert said in " ".join(fault.what for fault in faults)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": [USER], "chosen": [ANSWER]}, "no `rejected`"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen and rejected are the same"),
        ({"prompt": [USER, ANSWER], "chosen": [ANSWER], "rejected": [USER]}, "the prompt ends with an answer already"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [ANSWER]}, "chosen[0] is of the role user, not assistant"),
        ({"prompt": [USER], "chosen": "Yes", "rejected": [ANSWER]}, "chosen is not a list of one assistant message"),
    ],
)
def test_a_preference_has_a_prompt_and_two_different_answers(
    tmp_path: Path, record: dict[str, object], said: str
) -> None:
    (fault,) = read(write_jsonl(tmp_path / "dpo.jsonl", [record]), "dpo").faults
    assert said in fault.what


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_bring_the_check_down(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"{}\n" + content)
    found = read(path, "sft")
    assert len(found.faults) + len(found.records) == len(path.read_bytes().splitlines(keepends=False)) or found.faults


def test_duplicates_and_two_answers_to_one_question_are_told_apart(tmp_path: Path) -> None:
    records = [
        conversation("Hi", "Yes"),
        conversation("Hi", "No"),
        conversation("Hi", "Yes"),
        conversation("Ho", "Yes"),
    ]
    found = read(write_jsonl(tmp_path / "chat.jsonl", records), "sft")
    assert found.duplicates == [(3, 1)]
    assert found.contradictions == [(2, 1)]


def test_an_empty_file_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="is empty: give a JSONL file"):
        read(write_jsonl(tmp_path / "chat.jsonl", []), "sft")
    with pytest.raises(PlannerError, match="No such file"):
        read(tmp_path / "none.jsonl", "sft")


# --- tokens -----------------------------------------------------------------------------------------------------------

# one token a byte and one for each special token: <|im_start|> user \n Hi <|im_end|> \n is 1 + 5 + 2 + 1 + 1 = 10
# tokens, <|im_start|> assistant \n is 1 + 10 = 11, and Yes <|im_end|> \n is 3 + 1 + 1 = 5
OPENING, PROMPT, LEARNED = 11, 10 + 11, 5


def test_only_the_answer_is_learned(tmp_path: Path, chat: Chat) -> None:
    one = only_example(write_jsonl(tmp_path / "chat.jsonl", [conversation("Hi", "Yes")]), chat)
    assert len(one.tokens) == PROMPT + LEARNED
    assert one.labels == (IGNORED,) * PROMPT + one.tokens[PROMPT:]


def test_of_several_answers_the_last_or_all_are_learned(tmp_path: Path, chat: Chat) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [USER, ANSWER, USER, ANSWER]}])
    turn = PROMPT + LEARNED
    last, both, everything = (only_example(path, chat, loss_on=on) for on in ("completion", "assistant", "all"))
    assert [label != IGNORED for label in last.labels] == [False] * (turn + PROMPT) + [True] * LEARNED
    assert [label != IGNORED for label in both.labels] == 2 * ([False] * PROMPT + [True] * LEARNED)
    assert everything.labels == everything.tokens


def test_a_template_that_rewrites_earlier_answers_is_refused_where_they_are_learned(tmp_path: Path) -> None:
    # as reasoning models do: what was thought in earlier turns is taken out
    rewriting = TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content if loop.last or message.role == 'user' else 'gone' }}"
    )
    chat = load_chat(str(write_tokenizer(tmp_path / "model", rewriting)))
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [USER, ANSWER, USER, ANSWER]}])
    (fault,) = examples(read(path, "sft"), chat, "sft", "assistant")
    assert isinstance(fault, Fault)
    assert "use data.loss_on completion" in str(fault)
    assert sum(label != IGNORED for label in only_example(path, chat).labels) == LEARNED


def test_a_template_that_refuses_a_conversation_says_why_with_the_line(tmp_path: Path) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
    )
    chat = load_chat(str(write_tokenizer(tmp_path / "model", strict)))
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "system", "content": "x"}, USER, ANSWER]}])
    (fault,) = examples(read(path, "sft"), chat, "sft", "completion")
    assert f"{path}:1: the chat template of" in str(fault)
    assert "System role not supported" in str(fault)


def test_a_preference_keeps_prompt_and_answers_apart(tmp_path: Path, chat: Chat) -> None:
    record = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "No"}]}
    one = only_example(write_jsonl(tmp_path / "dpo.jsonl", [record]), chat, "dpo")
    assert (len(one.prompt), len(one.tokens), len(one.rejected)) == (PROMPT, PROMPT + LEARNED, LEARNED - 1)


def test_todays_date_is_in_no_token() -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}"
    assert Chat("x", None, dated, {}).text([]) == "2024"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer_config.json": "{}"}, "has no chat template, so it is no chat model"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "{% if %}"})}, "chat template of .* cannot be read"),
    ],
)
def test_a_model_without_tokenizer_or_template_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    if files:
        write_tokenizer(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(PlannerError, match=said):
        load_chat(str(tmp_path))


def test_a_template_cannot_reach_the_machine(tmp_path: Path) -> None:
    chat = Chat("x", None, "{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(PlannerError, match="refuses it"):
        chat.text([])


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_the_report_counts_tokens_and_what_truncation_loses(tmp_path: Path, chat: Chat) -> None:
    # 26, 26 and 26 + 17 = 43 tokens; at 24 the first two lose 2 of 5 learned tokens each, and the third, whose prompt
    # alone has 21 + 17 = 38, loses 43 - 24 = 19 tokens, among them all 5 that would be learned
    records = [conversation("Hi", "Yes"), conversation("Ho", "Yes"), conversation("H" * 19, "Yes")]
    report = report_on(write_jsonl(tmp_path / "chat.jsonl", records), chat=chat, max_length=24)
    assert report.sound
    assert report.characters == 2 + 3 + 2 + 3 + 19 + 3
    assert report.lengths is not None
    assert (report.lengths.tokens, report.lengths.learned_tokens) == (26 + 26 + 43, 15)
    assert (report.lengths.shortest, report.lengths.median, report.lengths.longest) == (26, 26, 43)
    assert [(one.up_to_tokens, one.conversations) for one in report.lengths.histogram] == [(32, 2), (64, 1)]
    cost = report.truncation
    assert cost is not None
    assert (cost.truncated, cost.lost_tokens, cost.lost_learned_tokens, cost.unlearnable) == (3, 23, 9, 1)
    assert (cost.fits_99, cost.fits_all, cost.packed_sequences, cost.padded_share) == (43, 43, 3, 0.0)


def test_lines_of_the_evaluation_file_are_found_in_the_training_file(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [conversation("Hi", "Yes"), conversation("Ho", "Yes")])
    held = write_jsonl(tmp_path / "held.jsonl", [conversation("He", "Yes"), conversation("Ho", "Yes")])
    assert report_on(train, against=held).leaked == ((2, 2),)


def prepared(path: Path, chat: Chat, max_length: int = 64, **data: Any) -> Any:
    return prepare(Data(train=str(path), **data), task="sft", chat=chat, max_length=max_length, train=path)


def test_what_is_too_long_is_cut_dropped_or_refused_as_the_configuration_says(tmp_path: Path, chat: Chat) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [conversation("Hi", "Yes"), conversation("Hi", "Y" * 20)])  # 26, 43
    assert [len(e.tokens) for e in prepared(path, chat, 30).train] == [26, 30]
    assert [len(e.tokens) for e in prepared(path, chat, 30, too_long="drop").train] == [26]
    with pytest.raises(PlannerError, match=r"chat.jsonl:2: 43 tokens are beyond max_length 30 \(1 such lines\)"):
        prepared(path, chat, 30, too_long="refuse")
    with pytest.raises(PlannerError, match="nothing is left to learn at max_length 10"):
        prepared(path, chat, 10)


def test_duplicates_are_learned_dropped_or_refused_as_the_configuration_says(tmp_path: Path, chat: Chat) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [conversation("Hi", "Yes")] * 3)
    assert len(prepared(path, chat).train) == 3
    assert [e.line for e in prepared(path, chat, duplicates="drop").train] == [1]
    with pytest.raises(PlannerError, match=r"chat.jsonl:2: the same as line 1"):
        prepared(path, chat, duplicates="refuse")


def test_a_share_is_set_aside_by_content_so_that_equal_lines_stay_together(tmp_path: Path, chat: Chat) -> None:
    records = [conversation(f"Question {i % 50}", "Yes") for i in range(100)]
    done = prepared(write_jsonl(tmp_path / "chat.jsonl", records), chat, evaluation_share=0.2)
    train, held = ({e.tokens for e in part} for part in (done.train, done.evaluation))
    assert not train & held
    assert len(done.train) + len(done.evaluation) == 100
    assert 0 < len(done.evaluation) < 50
    with pytest.raises(PlannerError, match=r"a share of 0.001 leaves 100 lines to learn and 0 to evaluate"):
        prepared(tmp_path / "chat.jsonl", chat, evaluation_share=0.001)


def test_the_share_is_that_of_the_digests_below_it() -> None:
    assert is_evaluation(bytes(8), 0.01)
    assert is_evaluation(b"\x7f" + b"\xff" * 7, 0.5)
    assert not is_evaluation(b"\x80" + bytes(7), 0.5)


def test_the_first_fault_stops_the_run_and_says_how_many_there_are(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(conversation("Hi", "Yes")) + "\n{\n\n")
    with pytest.raises(
        PlannerError, match=r"chat.jsonl:2: not JSON: .* \(2 faults in all\): correct it, then `planner"
    ):
        prepared(path, chat)
