"""The server's socket: everything that arrives is read, and no peer can break it for the others."""

import asyncio
import os
import socket

import pytest
import zmq

from tests.server.workers.conftest import until
from trtserve.plugins.api import WorkerLoad
from trtserve.server.workers import wire
from trtserve.server.workers.link import EndpointError, Link


async def is_well(house, name="witness"):
    """A new worker can join."""
    _, client = await house.worker(worker_id=name)
    return client.state == "ready"


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"garbage",),
        (b"a", b"b", b"c"),
        (b"\x92\xa8progress\xa2\xff\xfe",),
        (b"\x93\xa7welcome" + b"\x91" * 99_999,),
    ],
    ids=["empty", "garbage", "frames", "text", "deep"],
)
async def test_garbage_is_dropped(house, frames):
    peer, client = await house.worker()
    peer.say_bytes(*frames)
    peer.say(wire.Heartbeat(3, WorkerLoad()))
    await until(lambda: client.steps == 3)
    assert await is_well(house)


async def test_a_message_that_is_too_large_costs_its_sender_the_connection(house):
    peer, _ = await house.worker()
    monitor = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    peer.say_bytes(bytes(wire.MAX_MESSAGE_BYTES + 1))
    await until(lambda: monitor.poll(0))
    peer.socket.disable_monitor()
    monitor.close()
    assert await is_well(house)


async def test_a_flood_is_read_to_its_end_and_others_get_their_turn(house):
    peer, client = await house.worker()
    turns = 0

    async def take_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(take_turns())
    for number in range(1, 3001):
        peer.say(wire.Heartbeat(number, WorkerLoad()))
    await until(lambda: client.steps == 3000)
    other.cancel()
    assert turns > 5 and len(house.drained) > 5


async def test_messages_that_come_while_the_server_sends_are_read(house):
    """ZeroMQ's descriptor signals once; sending takes the signal away."""
    peer, client = await house.worker()
    for number in range(1, 301):
        peer.say(wire.Heartbeat(number, WorkerLoad()))
        client.send(wire.Welcome())
        if number % 10 == 0:
            await asyncio.sleep(0)
    await until(lambda: client.steps == 300)


async def test_sending_to_nobody_is_told(house):
    assert house.link.send(b"nobody", wire.Welcome()) is False


async def test_a_tcp_port_is_chosen():
    with Link("tcp://127.0.0.1:*", lambda *_: None, lambda: None) as link:
        assert int(link.endpoint.rpartition(":")[2]) > 0


async def test_an_address_in_use_is_an_error():
    with (
        Link("tcp://127.0.0.1:*", lambda *_: None, lambda: None) as link,
        pytest.raises(EndpointError, match="Address already in use"),
        Link(link.endpoint, lambda *_: None, lambda: None),
    ):
        pass


def linked(path):
    return Link(f"ipc://{path}", lambda *_: None, lambda: None)


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("a diary")
    with pytest.raises(EndpointError, match="no socket"), linked(tmp_path / "precious"):
        pass
    assert (tmp_path / "precious").read_text() == "a diary"


async def test_another_server_s_socket_is_not_taken(tmp_path):
    path = tmp_path / "socket"
    with linked(path):
        with pytest.raises(EndpointError, match="Address already in use"), linked(path):
            pass
        assert path.is_socket()
    assert not path.exists()


async def test_a_killed_server_s_socket_is_replaced(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with linked(path):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
        path.unlink()
        path.touch()  # somebody else's by now
    assert path.exists()


@pytest.mark.parametrize("endpoint", ["ipc://@trtserve-test-{}", "ipc://*"])
async def test_addresses_without_a_file_of_ours(endpoint):
    with Link(endpoint.format(os.getpid()), lambda *_: None, lambda: None) as link:
        assert link.endpoint.startswith("ipc://")
