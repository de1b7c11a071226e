"""The network of a sandbox through the agent's API, with an interface that leads to the host."""

from __future__ import annotations

from pathlib import Path

from tests.kata_lab.agent.guest import AgentGuest, StatusCode, agent_guest
from vmm.config import NetworkConfig

MAC = "02:00:00:00:00:15"


def _set_up(guest: AgentGuest) -> None:
    interface = {
        "hwAddr": MAC.upper(),
        "name": "net7",
        "mtu": 1400,
        "IPAddresses": [{"family": 0, "address": "10.7.0.2", "mask": "24"}],
    }
    told = guest.call("UpdateInterface", interface=interface)
    assert (told["name"], told["hwAddr"], told["mtu"]) == ("net7", MAC, 1400)
    addresses = [each["address"] for each in told["IPAddresses"] if each["family"] == 0]
    assert addresses == ["10.7.0.2"]


def test_an_interface_and_routes_are_set_up_and_used(tmp_path: Path) -> None:
    with agent_guest(tmp_path, network=NetworkConfig(name="net", backend="passt", mac=MAC)) as guest:
        _set_up(guest)
        routes = [
            {"dest": "", "gateway": "10.7.0.1", "device": "net7"},
            {"dest": "10.9.0.0/16", "gateway": "10.7.0.3", "device": "net7"},
        ]
        told = guest.call("UpdateRoutes", routes={"Routes": routes})["Routes"]
        found = {(each["dest"], each["gateway"], each["device"]) for each in told if each["family"] == 0}
        assert found == {("", "10.7.0.1", "net7"), ("10.9.0.0/16", "10.7.0.3", "net7"), ("10.7.0.0/24", "", "net7")}
        again = guest.call("UpdateRoutes", routes={"Routes": routes})["Routes"]
        assert len(again) == len(told), "to say it twice is to say it once"
        _set_up(guest)
        bad = {"Routes": [{"dest": "10.8.0.0/16", "gateway": "not-an-address", "device": "net7"}]}
        assert guest.refused("UpdateRoutes", routes=bad).code is StatusCode.INVALID_ARGUMENT
        with guest.container(["/bin/sh", "-c", "ip -o -4 addr show net7; ip route | head -1"]) as container:
            status, said = container.finish()
            assert (status, "10.7.0.2/24" in said) == (0, True)
            names = [each["name"] for each in guest.call("StatsContainer", container_id=container.id)["network_stats"]]
            assert sorted(names) == ["lo", "net7"]
