"""An example as the strings that a dataset's record holds, and back."""

import json

from popax.data.records import Example

FIELDS = ("user", "time", "kind", "text", "prompt", "completion", "messages")


def to_record(example: Example) -> dict[str, str]:
    """Only strings: the record format has no 64-bit float, and times must come back exactly."""
    kind = "messages" if example.messages is not None else "text" if example.text is not None else "completion"
    return {
        "user": example.user,
        "time": "" if example.time is None else json.dumps(example.time),
        "kind": kind,
        "text": example.text or "",
        "prompt": example.prompt or "",
        "completion": example.completion or "",
        "messages": json.dumps(example.messages, ensure_ascii=False) if kind == "messages" else "",
    }


def from_record(record: dict[str, bytes], index: int) -> Example:
    fields = {name: value.decode() for name, value in record.items()}
    content = {
        "text": lambda: {"text": fields["text"]},
        "completion": lambda: {"prompt": fields["prompt"], "completion": fields["completion"]},
        "messages": lambda: {"messages": tuple(json.loads(fields["messages"]))},
    }[fields["kind"]]()
    time = json.loads(fields["time"]) if fields["time"] else None
    return Example(user=fields["user"], index=index, time=time, **content)
