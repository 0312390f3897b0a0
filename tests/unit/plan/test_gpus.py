"""Links between GPUs."""

from __future__ import annotations

from beit3.plan.gpus import Cluster
from tests.unit.plan.conftest import H100


def test_a_group_in_one_machine_uses_its_links_and_one_across_machines_the_network() -> None:
    sent = 1e9
    assert Cluster(H100, 8).seconds(sent, 8, 1, 0) == sent / (0.8 * H100.link)
    assert Cluster(H100, 64).seconds(sent, 64, 1, 0) == sent / (0.8 * 8 * H100.network)  # all cards of a machine
    assert Cluster(H100, 64).seconds(sent, 8, 8, 0) == sent / (0.8 * H100.network)  # one card each
