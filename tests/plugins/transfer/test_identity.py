from dataclasses import replace

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer.identity import peer_info, same_node, why_memory_is_apart
from trtserve.plugins.transfer_api import TransferConfig

CONFIG = TransferConfig(WorkerId("one"), 3, "/run/x", host="192.0.2.1", device="cuda:1")
OWN = peer_info(CONFIG, "GPU-1")


def test_peer_info_is_stable_and_tells_the_configuration():
    assert peer_info(CONFIG, "GPU-1") == OWN
    assert (OWN.worker_id, OWN.incarnation, OWN.host) == ("one", 3, "192.0.2.1")
    assert (OWN.device, OWN.device_uuid) == ("cuda:1", "GPU-1")
    assert OWN.boot_id
    assert OWN.pid_namespace.startswith("pid:[")


def test_what_keeps_memory_apart():
    assert same_node(OWN, OWN)
    assert why_memory_is_apart(OWN, OWN, by_pid=True) is None
    elsewhere = replace(OWN, boot_id="other", host="192.0.2.9")
    assert "192.0.2.9" in (why_memory_is_apart(OWN, elsewhere, by_pid=False) or "")
    assert not same_node(OWN, elsewhere)
    assert "user" in (why_memory_is_apart(OWN, replace(OWN, uid=OWN.uid + 1), by_pid=False) or "")


def test_another_pid_namespace_matters_only_to_those_who_use_pids():
    contained = replace(OWN, pid_namespace="pid:[1]")
    assert why_memory_is_apart(OWN, contained, by_pid=False) is None
    assert "namespace" in (why_memory_is_apart(OWN, contained, by_pid=True) or "")
