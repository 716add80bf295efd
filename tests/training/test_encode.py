"""The ids and labels of a row, for every kind of tokenizer and for public chat templates."""

import json
import re
from pathlib import Path

import pytest
from tiny_training import make_tokenizer
from tokenizer_kinds import KINDS, TEMPLATE, made
from transformers import PreTrainedTokenizer

from multilora_fast.training.data import IGNORED, Row, encode

CALL = {"type": "function", "id": "call12345", "function": {"name": "look", "arguments": {"at": "pademelons"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look", "description": "Looks up.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
    },
}  # fmt: skip


def row(**fields) -> Row:
    return Row("task", fields, "rows.jsonl, line 1")


def turns(*contents: str, first: str = "user") -> list[dict]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def learnt(tokenizer, example) -> list[str]:
    """The texts of the runs of labels, without spaces, which a tokenizer of words does not keep."""
    runs, before = [], IGNORED
    for i, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, i)
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run).replace(" ", "") for run in runs]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return made(request.param)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"text": "the sky is blue"}, "theskyisblue"),
        ({"prompt": "the sky is", "completion": " blue ?"}, "blue?"),
        ({"prompt": "the sky ?", "completion": "blue"}, "blue"),
        ({"prompt": "", "completion": "blue"}, "blue"),
    ],
)
def test_texts_and_completions_are_learnt_with_one_end(fields, wanted, tokenizer):
    [example] = encode(row(**fields), tokenizer, 99)
    plain, end = tokenizer("".join(fields.values()))["input_ids"], tokenizer.eos_token_id
    assert example["input_ids"] == plain + [end] * (plain[-1] != end)
    assert example["input_ids"].count(end) == 1
    assert learnt(tokenizer, example) == [wanted + tokenizer.eos_token]


def test_the_answers_of_a_chat_are_learnt_with_their_ends(tokenizer):
    messages = [{"role": "system", "content": "red"}, *turns("sky ?", "blue", "grass ?", "green")]
    [example] = encode(row(messages=messages), tokenizer, 999)
    assert example["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert learnt(tokenizer, example) == [f"blue{tokenizer.eos_token}", f"green{tokenizer.eos_token}"]
    asked = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert example["input_ids"][: len(asked)] == asked
    assert example["labels"].index(example["input_ids"][len(asked)]) == len(asked)  # the first label


def test_all_can_be_learnt(tokenizer):
    rows = (row(messages=turns("sky ?", "blue")), row(prompt="the sky ?", completion="blue"), row(text="blue"))
    for one in rows:
        [example], [answers] = encode(one, tokenizer, 99, "all"), encode(one, tokenizer, 99)
        assert example["labels"] == example["input_ids"] == answers["input_ids"]


def test_long_rows_are_cut_and_left_out_where_no_answer_is_left():
    tokenizer, long = make_tokenizer(), row(prompt="the sky is", completion=" blue ?")
    [example] = encode(long, tokenizer, 4)
    assert example["labels"] == [IGNORED] * 3 + tokenizer.convert_tokens_to_ids(["blue"])
    assert encode(long, tokenizer, 3) == []


def test_tools_and_their_calls_reach_the_model():
    tokenizer = made("bytes")
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = [turns("sky ?")[0], called, {"role": "tool", "content": "blue"}, *turns("It is blue", first="assistant")]
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content or '' }}")
    [example] = encode(row(messages=messages, tools=[TOOL]), tokenizer, 9999)
    text = tokenizer.decode(example["input_ids"])
    assert json.dumps(TOOL) in text
    assert learnt(tokenizer, example) == [f"{json.dumps(CALL['function'])}</s>".replace(" ", ""), "Itisblue</s>"]


@pytest.mark.parametrize("content", [None, "", "Looking."])
def test_what_the_template_drops_of_an_answer_is_refused(content):
    tokenizer, both = made("bytes"), TEMPLATE.replace("{{ m.content }}", "{{ m.content or '' }}")
    called = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    refused = [
        (both.replace("m.tool_calls", "[]"), called, "tool calls"),
        (both.replace("m.content or ''", "m.content if not m.tool_calls"), {**called, "content": "Looking."}, "text"),
        (IDEFICS, {"role": "assistant", "content": "e"}, "text"),
    ]
    for template, answer, dropped in refused:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"line 1: the model's chat template drops the {dropped} of an answer."):
            encode(row(messages=[*turns("sky ?"), answer]), tokenizer, 9999)
    tokenizer.chat_template = both
    [example] = encode(row(messages=[*turns("sky ?"), called]), tokenizer, 9999)
    assert learnt(tokenizer, example)[0].startswith(f"{content or ''}{{")


IDEFICS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}<e>{% endfor %}"
REWRITES = (  # thinks in its last answer alone, as Qwen3 does
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<t></t>{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_where_the_template_rewrites_the_past_every_answer_is_an_example():
    tokenizer, messages = made("bytes"), turns("sky ?", "blue", "grass ?", "green", "so ?")
    tokenizer.chat_template = REWRITES
    first, second = encode(row(messages=messages), tokenizer, 999)
    assert first["input_ids"] == tokenizer.apply_chat_template(messages[:2])["input_ids"]
    assert second["input_ids"] == tokenizer.apply_chat_template(messages[:4])["input_ids"]
    assert [*learnt(tokenizer, first), *learnt(tokenizer, second)] == ["<t></t>blue</s>", "<t></t>green</s>"]
    [whole] = encode(row(messages=messages), tokenizer, 999, "all")
    assert whole["labels"] == tokenizer.apply_chat_template(messages)["input_ids"]


HEAD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        (f"{HEAD}{{% if add_generation_prompt %}}<|assistant|><think>{{% endif %}}", turns("?", "<b>"), ["<b></s>"]),
        (HEAD.replace("<|{{ m.role }}|>", "<|{{ m.role }}|><think></think>")
         + "{% if add_generation_prompt %}<|assistant|><think>a{% endif %}", turns("?", "b"), ["</think>b</s>"]),
        ("a default{{ eos_token }}" + TEMPLATE, turns("blue", "sky ?", "green", first="assistant"),
         ["blue</s>", "green</s>"]),
        ("{% for m in messages %}{{ 'red ' if loop.last and m.role == 'user' }}{{ m.content }}{{ eos_token }}"
         "{% endfor %}", turns("sky ?", "blue"), ["blue</s>"]),
        (TEMPLATE, [*turns("sky ?", "blue"), *turns("sky", first="assistant")], ["blue</s>", "sky</s>"]),
    ],
    ids=["opens thinking", "closes thinking", "begins with an answer", "the past is not the prompt", "two in a row"],
)  # fmt: skip
def test_learnt_is_what_inference_produces(template, messages, wanted):
    tokenizer = made("bytes")
    tokenizer.chat_template = template
    [example] = encode(row(messages=messages), tokenizer, 999)
    assert example["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert learnt(tokenizer, example) == wanted


def test_what_the_template_refuses_is_named_by_its_row():
    tokenizer = make_tokenizer()
    for template, said in [
        (None, "no chat template"), ("{{ raise_exception('roles must alternate') }}", "roles must"), ("{% if %}", ""),
    ]:  # fmt: skip
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"rows.jsonl, line 1.*{said}"):
            encode(row(messages=turns("sky ?", "blue")), tokenizer, 10)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {}

    with pytest.raises(ValueError, match=r"line 1: .*Slow"):
        encode(row(text="blue"), Slow(), 10)


ASKED, ANSWERED = ("quokkas", "wombats", "numbats"), ("Marsupials", "Monotremes")
CHATS = {
    "two turns": turns(ASKED[0], ANSWERED[0], ASKED[1], ANSWERED[1]),
    "a system message": [{"role": "system", "content": ASKED[2]}, *turns(ASKED[0], ANSWERED[0])],
    "an unanswered turn": turns(ASKED[0], ANSWERED[0], ASKED[1]),
    "tools": [
        *turns(ASKED[0]), {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "tool_call_id": "call12345", "content": ASKED[1]},
        {"role": "assistant", "content": ANSWERED[0]},
    ],
}  # fmt: skip


def test_every_template_of_trl_that_renders_texts():
    trl = pytest.importorskip("trl", reason="needs trl")
    tokenizer, seen, refused = made("bytes"), {}, set()
    files = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
    assert len(files) > 30
    for path in files:
        tokenizer.chat_template = path.read_text()
        for name, messages in CHATS.items():
            tools = [TOOL] if name == "tools" else None
            where = f"{path.stem}: {name}"
            try:
                text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            except Exception:
                assert_refused(tokenizer, messages, tools, "refuses", where)
                continue
            if not all(answer["content"] in text for answer in messages if answer["role"] == "assistant"):
                assert_refused(tokenizer, messages, tools, "drops the text", where)
                refused.add(path.stem.removesuffix("_training"))
                continue
            if name == "tools" and "pademelons" not in text:
                assert_refused(tokenizer, messages, tools, "drops the tool calls", where)
                continue
            check(tokenizer, messages, tools, text, where)
            seen[name] = seen.get(name, 0) + 1
    print(seen, refused)
    assert refused == {"idefics3", "smolvlm"}
    assert all(seen[name] >= 40 for name in CHATS), seen


def assert_refused(tokenizer, messages, tools, how, where) -> None:
    with pytest.raises(ValueError, match=f"line 1: the model's chat template {how}"):
        print(where, encode(row(messages=messages, tools=tools), tokenizer, 9**9))


def check(tokenizer, messages, tools, text, where) -> None:
    examples = encode(row(messages=messages, tools=tools), tokenizer, 9**9)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [text]
    if len(examples) > 1 or examples[0]["input_ids"] != tokenizer(text, add_special_tokens=False)["input_ids"]:
        texts = [tokenizer.apply_chat_template(messages[: i + 1], tools=tools, tokenize=False) for i in answers]
    wanted = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
    assert [example["input_ids"] for example in examples] == wanted, where
    runs = [run for example in examples for run in learnt(tokenizer, example)]
    assert len(runs) == len(answers), (where, runs)
    for i, run in zip(answers, runs, strict=True):
        assert messages[i]["content"] in run, (where, run)
        assert "tool_calls" not in messages[i] or "pademelons" in run, (where, run)
        assert not re.search("|".join(ASKED), run), (where, run)
        end = run.partition(messages[i]["content"])[2] if messages[i]["content"] else "<"
        assert end or where.startswith("glm4moe:"), (where, run)  # whose next turn is the end
