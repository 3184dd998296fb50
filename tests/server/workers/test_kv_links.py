"""What the server knows of connections between workers: as real workers report it, and as played ones do."""

import logging

from tests.server.workers.conftest import until
from tests.server.workers.kv_sites import connected
from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer_api import PeerInfo
from trtserve.server.workers.kv_links import KVLinks
from trtserve.server.workers.kv_messages import KVLinked, KVPeer, KVPeerGone

PEER = PeerInfo(WorkerId("p"), 3, "boot", "ns", 0, 1, "127.0.0.1")


def linked(incarnation=3, problem=""):
    found = ("", "", 0.0) if problem else ("shm", "memfd", 2e9)
    return KVLinked(WorkerId("p"), incarnation, *found, problem)


def only(links):
    (link,) = links
    return link


async def test_real_workers_tell_their_lane_and_its_speed(sites):
    _, decode = await sites.pair()
    link = only(decode.kv.links)
    await until(lambda: link.is_up)
    assert (link.worker_id, link.transfer, link.failures) == ("prefill-0", "shm", 0)
    assert link.lane and link.bandwidth_bytes_per_s > 1e6


async def test_a_pair_without_a_lane_is_told_with_every_transfers_reason(sites):
    prefill, decode = await sites.pair()
    port = prefill.kv.port
    decode.kv.links.introduce(KVPeer(WorkerId("stranger"), 9, port.layout, port.info, ()))
    link = next(link for link in decode.kv.links if link.worker_id == "stranger")
    await until(lambda: link.failures)
    assert not link.is_up and link.problem == "shm: it does not offer it"
    decode.kv.links.introduce(KVPeer(WorkerId("other"), 9, "another layout", port.info, port.exports))
    link = next(link for link in decode.kv.links if link.worker_id == "other")
    await until(lambda: link.failures)
    assert "its KV layout is another layout" in link.problem
    await connected(decode, 1)


def test_what_is_told_of_strangers_and_former_ones_does_not_count():
    said = []
    links = KVLinks(WorkerId("d"), lambda message: said.append(message) or True)
    links.on_linked(linked())
    assert not list(links)
    links.introduce(KVPeer(WorkerId("p"), 3, "layout", PEER, ()))
    links.on_linked(linked(incarnation=2))
    assert not only(links).is_up
    links.on_linked(linked())
    assert only(links).is_up
    links.part(WorkerId("p"), 3)
    assert not list(links) and said[-1] == KVPeerGone(WorkerId("p"), 3)


def test_each_connection_and_each_reason_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    links = KVLinks(WorkerId("d"), lambda message: True)
    links.introduce(KVPeer(WorkerId("p"), 3, "layout", PEER, ()))
    for problem in ("no route", "no route", "refused", ""):
        links.on_linked(linked(problem=problem))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "d reads the KV of p by shm over memfd, 2.0 GB/s" in caplog.text
    assert only(links).failures == 3
