"""Who is told of whom: at every time a decode worker knows the prefill workers that are there, and nobody else."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import Role, WorkerId
from trtserve.plugins.transfer_api import PeerInfo
from trtserve.server.kv_peers import KVPeers
from trtserve.server.workers.kv_links import KVLinks
from trtserve.server.workers.kv_messages import KVPeer, KVPort

NAMES = ["a", "b", "c", "d"]


class Played:
    """A worker that keeps what it was told of."""

    def __init__(self, name: str) -> None:
        self.worker_id = WorkerId(name)
        self.role = Role.PREFILL
        self.known: set[tuple[str, int]] = set()
        info = PeerInfo(self.worker_id, 1, "boot", "pid:1", 0, 1, "127.0.0.1")
        self.kv = SimpleNamespace(
            port=KVPort("layout", 64, 8, info, ()), incarnation=0, links=KVLinks(self.worker_id, self.send)
        )

    def send(self, message) -> bool:
        who = (message.worker_id, message.incarnation)
        if isinstance(message, KVPeer):
            assert who not in self.known, "introduced twice"
            self.known.add(who)
        else:
            self.known.discard(who)
        return True


ACTS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["prefill", "decode", "gone"])), max_size=30)


@given(ACTS)
def test_whatever_comes_goes_and_changes(acts):
    peers, workers, there = KVPeers(), {name: Played(name) for name in NAMES}, set()
    for name, act in acts:
        client = workers[name]
        if act == "gone":
            peers.gone(client)
            there.discard(name)
        elif name not in there:
            client.role, client.known = Role(act), set()
            client.kv.links.clear()
            client.kv.incarnation += 1
            peers.ready(client)
            there.add(name)
        elif client.role is not Role(act):
            former, client.role = client.role, Role(act)
            peers.relabelled(client, former)
        givers = {(other, workers[other].kv.incarnation) for other in there if workers[other].role is Role.PREFILL}
        for other in there:
            known = givers if workers[other].role is Role.DECODE else set()
            links = {(link.worker_id, link.incarnation) for link in workers[other].kv.links}
            assert workers[other].known == links == known
