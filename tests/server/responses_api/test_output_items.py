"""The items of a response and their events, read by the openai package's own types."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter

from minserve.server.answer.parts import Content, Part, Reasoning, ToolArguments, ToolCallBegin
from minserve.server.json_array import JsonArray, dump_json
from minserve.server.responses_api.output_items import Event, OutputItems

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEMS: TypeAdapter[Any] = TypeAdapter(ResponseOutputItem)


def told(parts: list[Part], *, complete: bool = True) -> tuple[list[Event], list[dict[str, Any]]]:
    """The events and the items of an output, each as the client's types read it."""
    output = OutputItems()
    events = [event for part in parts for event in output.add(part)]
    events += output.end(complete=complete)
    for number, event in enumerate(events):
        event["sequence_number"] = number
        assert EVENTS.validate_json(dump_json(event)).type == event["type"]
    for item in output.items():
        assert ITEMS.validate_json(dump_json(item)).type == item["type"]
    return events, output.items()


def gathered(events: list[Event]) -> list[dict[str, Any]]:
    """What a client knows that looks at the deltas alone: the type and text of each item."""
    items: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append({"type": event["item"]["type"], "id": event["item"]["id"], "text": ""})
        elif event["type"].endswith(".delta"):
            item = items[event["output_index"]]
            assert event["item_id"] == item["id"]
            item["text"] += event["delta"]
    return items


def text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return item["arguments"]
    (part,) = item["content"]
    return part["text"]


def test_each_kind_of_part_has_its_item_with_all_its_events() -> None:
    events, items = told(
        [
            Reasoning("hm, "),
            Reasoning("so"),
            Content("I ask."),
            ToolCallBegin(0, "call_1", "weather"),
            ToolArguments(0, '{"city":'),
            ToolArguments(0, ' "Köln"}'),
        ]
    )
    of_text = [
        "output_item.added",
        "content_part.added",
        "{}.delta",
        "{}.done",
        "content_part.done",
    ]
    assert [event["type"].removeprefix("response.") for event in events] == [
        *(of_text[i].format("reasoning_text") for i in (0, 1, 2, 2, 3, 4)),
        "output_item.done",
        *(of_text[i].format("output_text") for i in (0, 1, 2, 3, 4)),
        "output_item.done",
        *(of_text[i].format("function_call_arguments") for i in (0, 2, 2, 3)),
        "output_item.done",
    ]
    reasoning, message, call = items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, so"}]
    assert message["content"][0]["text"] == "I ask."
    assert (call["call_id"], call["name"]) == ("call_1", "weather")
    assert call["arguments"] == '{"city": "Köln"}'
    assert [item["id"].split("_")[0] for item in items] == ["rs", "msg", "fc"]
    finished = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert finished == items


def test_text_between_calls_is_a_message_of_its_own() -> None:
    _, items = told(
        [Content("a"), ToolCallBegin(0, "x", "f"), ToolCallBegin(1, "y", "g"), Content("b")]
    )
    assert [item["type"] for item in items] == [
        "message", "function_call", "function_call", "message",
    ]  # fmt: skip
    assert [text_of(item) for item in items] == ["a", "", "", "b"]


def test_an_output_without_a_text_is_an_empty_message() -> None:
    events, items = told([])
    assert [item["content"][0]["text"] for item in items] == [""]
    assert gathered(events) == [{"type": "message", "id": items[0]["id"], "text": ""}]
    assert told([], complete=False) == ([], [])


def test_what_broke_off_says_so_and_its_arguments_are_not_called_done() -> None:
    events, items = told(
        [Content("a"), ToolCallBegin(0, "x", "f"), ToolArguments(0, '{"ci')], complete=False
    )
    assert [item["status"] for item in items] == ["completed", "incomplete"]
    assert text_of(items[1]) == '{"ci'
    assert events[-1]["item"] == items[1]
    assert "response.function_call_arguments.done" not in [event["type"] for event in events]


def test_log_probabilities_are_told_with_their_text_and_again_at_its_end() -> None:
    output = OutputItems()
    tokens = [{"token": one, "bytes": [0], "logprob": -0.5, "top_logprobs": []} for one in "ab"]
    events = []
    for token in tokens:
        logprobs = JsonArray()
        logprobs.extend([token])
        events += output.add(Content(token["token"]), logprobs)
    events += output.end(complete=True)
    read = [EVENTS.validate_json(dump_json({**one, "sequence_number": 0})) for one in events]
    deltas = [one for one in read if one.type == "response.output_text.delta"]
    assert [[entry.token for entry in one.logprobs] for one in deltas] == [["a"], ["b"]]
    (done,) = [one for one in read if one.type == "response.output_text.done"]
    assert [entry.token for entry in done.logprobs] == ["a", "b"]
    message = ITEMS.validate_json(dump_json(output.items()[0]))
    assert [entry.model_dump() for entry in message.content[0].logprobs] == tokens


PARTS = st.lists(
    st.builds(Reasoning, st.text())
    | st.builds(Content, st.text())
    | st.builds(lambda text: ("call", text), st.text()),
    max_size=8,
)


@settings(max_examples=50)
@given(PARTS, st.booleans())
def test_deltas_alone_tell_all_that_the_items_do(drawn: list[Any], complete: bool) -> None:
    parts: list[Part] = []
    calls = 0
    for one in drawn:
        if isinstance(one, Reasoning | Content):
            parts.append(one)
        else:
            parts += [ToolCallBegin(calls, f"id{calls}", "f"), ToolArguments(calls, one[1])]
            calls += 1
    events, items = told(parts, complete=complete)
    known = gathered(events)
    assert [(one["type"], one["id"], one["text"]) for one in known] == [
        (item["type"], item["id"], text_of(item)) for item in items
    ]
