"""Views of a container's start say in words what they show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kata_lab import lab
from kata_lab.agent.client import AgentCall, AgentClient
from kata_lab.errors import KataLabError
from kata_lab.oci import ensure_busybox
from kata_lab.ttrpc import StatusCode


def call(method: str, began: float, status: StatusCode = StatusCode.OK, **request: Any) -> AgentCall:
    return AgentCall(method, {"container_id": "web", "exec_id": "web", **request}, began, 0.25, status)


CREATE = call(
    "CreateContainer",
    10.0,
    OCI={"Process": {"Args": ["uname", "-a"]}},
    storages=[{"driver": "overlayfs"}],
    sandbox_pidns=False,
)
CALLS = [call("ReadStdout", 10.5, len=65536), CREATE, call("StartContainer", 10.3, StatusCode.INTERNAL)]


def test_calls_are_told_in_the_order_in_which_they_were_made() -> None:
    told = lab.call_diagram(CALLS).alternative

    assert (
        "CreateContainer web, uname -a, overlayfs answered after 250 ms, for which the agent runs crun create" in told
    )
    assert told.index("CreateContainer") < told.index("StartContainer") < told.index("ReadStdout")
    assert "StartContainer web answered after 250 ms, which failed with INTERNAL" in told


def test_a_table_of_calls_begins_at_the_first() -> None:
    rows = lab.call_table(CALLS).rows

    assert [(row[0], row[2]) for row in rows] == [
        ("0", "CreateContainer"),
        ("300", "StartContainer"),
        ("500", "ReadStdout"),
    ]


def test_what_a_container_is_called_is_text_and_no_markup() -> None:
    assert "<b>" not in lab.call_diagram([call("StartContainer", 1.0, container_id="<b>")]).markup


def test_many_calls_are_counted_and_not_all_drawn() -> None:
    assert "and 60 more" in lab.call_diagram([call("ReadStdout", float(at)) for at in range(100)]).alternative


def test_no_calls_are_refused() -> None:
    with pytest.raises(KataLabError, match="there is no call to draw"):
        lab.call_diagram([])


def test_calls_of_a_block_are_kept_and_told_and_who_listened_still_hears() -> None:
    heard: list[AgentCall] = []
    told: list[str] = []
    agent: Any = SimpleNamespace(on_call=heard.append)
    client: AgentClient = agent

    with lab.agent_calls(client, told.append) as calls:
        agent.on_call(CREATE)
    agent.on_call(CALLS[0])

    assert calls == [CREATE]
    assert heard == [CREATE, CALLS[0]]
    assert told == ["CreateContainer   250.0 ms  web, uname -a, overlayfs"]


def test_a_start_is_told_step_by_step() -> None:
    told = lab.sandbox_timeline([("prepared", 0.25), ("sandbox ready", 2.0)]).alternative

    assert told == "Start of the sandbox: prepared after 0.25 s; sandbox ready after 2.00 s."


def test_a_start_that_was_not_is_refused() -> None:
    with pytest.raises(KataLabError, match="start the sandbox first"):
        lab.sandbox_timeline([])


def test_an_image_is_told_by_its_digests() -> None:
    with ensure_busybox(progress="off") as image:
        table = lab.layer_table(image)

        assert [row[0] for row in table.rows] == ["manifest", "configuration", "layer 1"]
        assert table.rows[0][1] == image.digest[:19]
