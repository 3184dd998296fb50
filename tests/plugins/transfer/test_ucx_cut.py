"""The UCX transfer between two network namespaces, whose link is cut. Needs root; skipped where namespaces cannot be
made."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from trtserve.plugins.conformance.transfer_case import Copies, SiteProcess, TransferCase
from trtserve.plugins.transfer import ucx
from trtserve.plugins.transfer_api import TransferOutcome

pytestmark = pytest.mark.skipif(ucx.missing("transfer", "ucx") is not None, reason="no libucp")

READER, SOURCE = (f"trt-{side}-{os.getpid()}" for side in ("r", "s"))
PLAN: Copies = {"keys": (range(5, 25), range(20))}
OTHER: Copies = {"keys": ([1, 2], [60, 61])}


@pytest.fixture
def namespaces():
    """Two, READER and SOURCE, joined by a pair of interfaces, both called kv."""
    if shutil.which("ip") is None or os.geteuid() != 0 or ip("netns", "add", READER).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        for arguments in (
            ("netns", "add", SOURCE),
            ("-n", READER, "link", "add", "kv", "type", "veth", "peer", "name", "kv", "netns", SOURCE),
            ("-n", READER, "addr", "add", "10.123.45.1/24", "dev", "kv"),
            ("-n", SOURCE, "addr", "add", "10.123.45.2/24", "dev", "kv"),
            ("-n", READER, "link", "set", "kv", "up"),
            ("-n", SOURCE, "link", "set", "kv", "up"),
        ):
            made = ip(*arguments)
            assert made.returncode == 0, made.stderr
        yield
    finally:
        ip("netns", "del", READER)
        ip("netns", "del", SOURCE)


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)


def site_in(deployment, namespace, worker_id, incarnation=1):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    module = "trtserve.plugins.conformance.transfer_site"
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", module, str(theirs.fileno())]
    with theirs:
        environment = {**os.environ, **deployment.case.environment}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    site = SiteProcess(process, ours, deployment.case.deadline_s)
    deployment.open(site, worker_id, incarnation=incarnation)
    return site


@pytest.mark.usefixtures("namespaces")
def test_a_cut_link_ends_at_the_deadline_and_can_be_mended():
    case = TransferCase("trtserve.plugins.transfer.ucx", "ucx", environment={"UCX_TLS": "tcp", "UCX_NET_DEVICES": "kv"})
    with case.deployment() as deployment:
        reader, source = site_in(deployment, READER, "reader"), site_in(deployment, SOURCE, "source")
        try:
            peer = reader.import_site(source)
            assert (peer.lane, reader.read(peer, OTHER).outcome) == ("tcp", TransferOutcome.DONE)
            ip("-n", SOURCE, "link", "set", "kv", "down")
            assert reader.read(peer, PLAN, deadline_s=0.3).outcome is TransferOutcome.TIMED_OUT
            ip("-n", SOURCE, "link", "set", "kv", "up")
            again = reader.import_site(source)
            plan: Copies = {"keys": ([40], [40])}
            assert reader.read(again, plan).outcome is TransferOutcome.DONE
            reader.check((peer, OTHER), (again, plan))  # and nothing of PLAN, late or early
        finally:
            reader.end()
            source.end()
