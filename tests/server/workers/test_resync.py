"""A server that has missed KV events asks a real worker, over real sockets, which blocks it has."""

from tests.server.workers.played_server import submit
from trtserve.server.workers import wire


class Follower:
    """What a server knows of a worker's blocks from its steps."""

    def __init__(self):
        self.known, self.next_event = set(), 0

    def sees_gap(self, step):
        return step.first_event != self.next_event

    def follow(self, step):
        assert not self.sees_gap(step)
        self.next_event += len(step.events)
        for event in step.events:
            match event:
                case wire.Stored(_, hashes):
                    self.known |= set(wire.hashes_of(hashes))
                case wire.Removed(hashes):
                    self.known -= set(wire.hashes_of(hashes))
                case wire.Cleared():
                    self.known = set()

    def replace(self, blocks):
        self.known, self.next_event = set(wire.hashes_of(blocks.hashes)), blocks.next_event


def joined(server, *followers):
    """The worker is ready, and the followers know its warm-up."""
    for message in server.welcome():
        if isinstance(message, wire.Step):
            for follower in followers:
                follower.follow(message)


def served(server, number, **sizes):
    """A request's steps, all of them."""
    server.say(submit(number, **sizes))
    steps = [server.receive(wire.Step)]
    while not any(detail.request_id == number and detail.finish_reason for detail in steps[-1].details):
        steps.append(server.receive(wire.Step))
    return steps


def resynced(server):
    server.say(wire.Resync())
    return server.receive(wire.Blocks)


def test_the_whole_set_is_what_the_events_made(server, run):
    run()
    follower, has_removed = Follower(), False
    joined(server, follower)
    for number in range(1, 12):
        for step in served(server, number, num_tokens=100 + 16 * number):
            follower.follow(step)
            has_removed |= any(isinstance(event, wire.Removed) for event in step.events)
    blocks = resynced(server)
    assert (set(wire.hashes_of(blocks.hashes)), blocks.next_event) == (follower.known, follower.next_event)
    assert has_removed and len(follower.known) > 40


def test_a_lost_step_is_made_up_for(server, run):
    run()
    follower, witness = Follower(), Follower()
    joined(server, follower, witness)
    lost, *seen = served(server, 1, num_tokens=100)
    for step in (lost, *seen):
        witness.follow(step)
    assert lost.events and follower.sees_gap(seen[0])
    follower.replace(resynced(server))
    assert (follower.known, follower.next_event) == (witness.known, witness.next_event)
    for step in served(server, 2, num_tokens=300):
        follower.follow(step)
        witness.follow(step)
    assert follower.known == witness.known


def test_answers_under_load_have_their_place(server, run):
    """Whoever has missed nothing knows just what each answer says."""
    run()
    follower = Follower()
    joined(server, follower)
    for number in range(1, 9):
        server.say(submit(number, num_tokens=100 + number, max_tokens=40))
        server.say(wire.Resync())
    num_ended = num_answers = 0
    while num_ended < 8 or not num_answers:
        message = server.receive(wire.Step, wire.Blocks)
        if isinstance(message, wire.Blocks):
            num_answers += 1
            assert (message.next_event, set(wire.hashes_of(message.hashes))) == (follower.next_event, follower.known)
        else:
            follower.follow(message)
            num_ended += sum(detail.finish_reason is not None for detail in message.details)


def test_there_is_an_answer_before_there_is_an_engine(server, run):
    run(fail_start=True)
    server.receive(wire.Hello)
    assert resynced(server) == wire.Blocks(0, b"")
