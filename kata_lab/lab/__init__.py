"""What the notebooks use: views of a machine, and checks of the exercises.

A view takes data of a machine and gives a :class:`~kata_lab.lab.picture.Picture` or a
:class:`~kata_lab.lab.picture.Table`, which show themselves in a notebook, in a terminal and to a screen reader. Views
read machines and never change them; a probe listens to a device, and can stop the guest at a request. The names below
are imported when they are first used, matplotlib and ipywidgets when a picture is drawn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kata_lab.lab.bare import Outcome, run_bare
    from kata_lab.lab.bits import draw_instruction
    from kata_lab.lab.boot_views import boot_timeline, exits_chart, milestone_table
    from kata_lab.lab.capstone import DesignBench
    from kata_lab.lab.capstone_exercise import history_table, score_card
    from kata_lab.lab.console_view import ConsoleView, transcript
    from kata_lab.lab.container_views import agent_calls, call_diagram, call_table, layer_table, sandbox_timeline
    from kata_lab.lab.device_views import (
        access_table,
        exit_counts,
        exits_per,
        feature_table,
        latency_chart,
        request_table,
        slot_table,
    )
    from kata_lab.lab.exercise import Feedback
    from kata_lab.lab.hand_driver import HandDriver
    from kata_lab.lab.hotplug_views import (
        HotplugControls,
        Steps,
        field_table,
        frame_table,
        hotplug_timeline,
        record_table,
    )
    from kata_lab.lab.image_views import difference_table, image_table, size_chart, steps_chart
    from kata_lab.lab.image_workshop import Workshop, seconds_to_services
    from kata_lab.lab.live_view import LiveView, live
    from kata_lab.lab.machines import Machines
    from kata_lab.lab.memory_view import address_table, draw_touched, touched_bytes
    from kata_lab.lab.memory_watch import MemoryWatch, memory_over_time
    from kata_lab.lab.order import explain_errors
    from kata_lab.lab.picture import Picture, Table
    from kata_lab.lab.process_views import (
        call_path,
        crash,
        crash_table,
        follow_resize,
        latency_histograms,
        memory_chart,
        process_table,
        process_tree,
        read_processes,
        span_table,
    )
    from kata_lab.lab.queue_view import QueueView
    from kata_lab.lab.registers import code_table, register_table, step_table, take_steps
    from kata_lab.lab.score import Score, hint
    from kata_lab.lab.slot_probe import SlotProbe, Stopped, traced
    from kata_lab.lab.terminal_view import Terminal, terminal
    from kata_lab.lab.topology_view import sandbox_topology, topology_table
    from kata_lab.lab.tree import draw_tree
    from kata_lab.lab.virtqueue_view import draw_queue, hex_table, walk_table
    from kata_lab.lab.welcome import course_map, doctor_table

_HOMES = {
    "bare": ("Outcome", "run_bare"),
    "bits": ("draw_instruction",),
    "boot_views": ("boot_timeline", "exits_chart", "milestone_table"),
    "capstone": ("DesignBench",),
    "capstone_exercise": ("history_table", "score_card"),
    "console_view": ("ConsoleView", "transcript"),
    "container_views": ("agent_calls", "call_diagram", "call_table", "layer_table", "sandbox_timeline"),
    "device_views": (
        *("access_table", "exit_counts", "exits_per", "feature_table", "latency_chart", "request_table"),
        "slot_table",
    ),
    "exercise": ("Feedback",),
    "hand_driver": ("HandDriver",),
    "hotplug_views": (*("HotplugControls", "Steps", "field_table", "frame_table", "hotplug_timeline", "record_table"),),
    "image_views": ("difference_table", "image_table", "size_chart", "steps_chart"),
    "image_workshop": ("Workshop", "seconds_to_services"),
    "live_view": ("LiveView", "live"),
    "machines": ("Machines",),
    "memory_view": ("address_table", "draw_touched", "touched_bytes"),
    "memory_watch": ("MemoryWatch", "memory_over_time"),
    "order": ("explain_errors",),
    "picture": ("Picture", "Table"),
    "process_views": (
        *("call_path", "crash", "crash_table", "follow_resize", "latency_histograms", "memory_chart"),
        *("process_table", "process_tree", "read_processes", "span_table"),
    ),
    "queue_view": ("QueueView",),
    "registers": ("code_table", "register_table", "step_table", "take_steps"),
    "score": ("Score", "hint"),
    "slot_probe": ("SlotProbe", "Stopped", "traced"),
    "terminal_view": ("Terminal", "terminal"),
    "topology_view": ("sandbox_topology", "topology_table"),
    "tree": ("draw_tree",),
    "virtqueue_view": ("draw_queue", "hex_table", "walk_table"),
    "welcome": ("course_map", "doctor_table"),
}
_HOME_OF = {name: f"kata_lab.lab.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [
    "ConsoleView",
    "DesignBench",
    "Feedback",
    "HandDriver",
    "HotplugControls",
    "LiveView",
    "Machines",
    "MemoryWatch",
    "Outcome",
    "Picture",
    "QueueView",
    "Score",
    "SlotProbe",
    "Steps",
    "Stopped",
    "Table",
    "Terminal",
    "Workshop",
    "access_table",
    "address_table",
    "agent_calls",
    "boot_timeline",
    "call_diagram",
    "call_path",
    "call_table",
    "code_table",
    "course_map",
    "crash",
    "crash_table",
    "difference_table",
    "doctor_table",
    "draw_instruction",
    "draw_queue",
    "draw_touched",
    "draw_tree",
    "exit_counts",
    "exits_chart",
    "exits_per",
    "explain_errors",
    "feature_table",
    "field_table",
    "follow_resize",
    "frame_table",
    "hex_table",
    "hint",
    "history_table",
    "hotplug_timeline",
    "image_table",
    "latency_chart",
    "latency_histograms",
    "layer_table",
    "live",
    "memory_chart",
    "memory_over_time",
    "milestone_table",
    "process_table",
    "process_tree",
    "read_processes",
    "record_table",
    "register_table",
    "request_table",
    "run_bare",
    "sandbox_timeline",
    "sandbox_topology",
    "score_card",
    "seconds_to_services",
    "size_chart",
    "slot_table",
    "span_table",
    "step_table",
    "steps_chart",
    "take_steps",
    "terminal",
    "topology_table",
    "touched_bytes",
    "traced",
    "transcript",
    "walk_table",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'kata_lab.lab' has no attribute {name!r}; it has {', '.join(sorted(_HOME_OF))}")
    found: object = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
