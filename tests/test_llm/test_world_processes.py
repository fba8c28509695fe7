"""Worlds in processes: they say the same, and one that takes its process with it costs what lived there."""

import os
import textwrap

import pytest

from eggroll.errors import ConfigError
from eggroll.llm import Turn, World, WorldReward
from eggroll.llm.worlds.host import Host
from eggroll.llm.worlds.load import load_world
from eggroll.llm.worlds.processes import ProcessHost
from eggroll.llm.worlds.world import Completion

WORLD = textwrap.dedent(
    """
    import os, time
    from eggroll.llm import Turn, World

    class Remembers(World):
        def reset(self, row):
            self.said, self.row = [], row
            return f"row {row['n']} in another process: {os.getpid() != row['process']}"

        def step(self, completion):
            self.said.append(completion)
            if completion == "die":
                os._exit(1)
            if completion == "loop":
                while True:
                    pass
            if completion == "sleep":
                time.sleep(60)
            return Turn(f"{self.row['n']}: {' '.join(self.said)}", score=len(self.said))
    """
)


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    file = tmp_path_factory.mktemp("worlds") / "remembers.py"
    file.write_text(WORLD)
    return load_world(f"{file}:Remembers")


@pytest.fixture(scope="module")
def host(kind):
    made = ProcessHost(kind, 1.0, "Remembers", 2)
    yield made
    made.close()


def rows(count):
    return {n: {"n": n, "process": os.getpid()} for n in range(count)}


def said(found):
    return {row: turn.messages[0]["content"] if isinstance(turn, Turn) else turn.kind for row, turn in found.items()}


def test_worlds_in_processes_say_what_worlds_here_say(host, kind):
    here = Host(kind, 1.0, "Remembers")
    opened, own = host.open(rows(3)), here.open(rows(3))
    assert opened[2].messages[0]["content"] == "row 2 in another process: True"
    assert own[2].messages[0]["content"] == "row 2 in another process: False"
    for texts in ({0: "a", 1: "b", 2: "c"}, {0: "d", 2: "e"}):
        told = {row: Completion(text) for row, text in texts.items()}
        assert said(host.step(told)) == said(here.step(told))
    assert said(host.step({2: Completion("f")})) == {2: "2: c e f"}
    assert {row: score for row, (score, _) in host.end([0, 1, 2], show=False).items()} == {0: None, 1: None, 2: None}


def test_a_world_that_hangs_is_left_alone(host):
    host.open(rows(4))
    told = {row: Completion(text) for row, text in enumerate(["loop", "sleep", "c", "d"])}
    assert said(host.step(told)) == {0: "late", 1: "late", 2: "2: c", 3: "3: d"}
    host.end(range(4), show=False)


def test_a_process_that_dies_is_replaced(host):
    host.open(rows(4))
    found = host.step({row: Completion("die" if row == 0 else "x") for row in range(4)})
    assert said(found) == {0: "lost", 1: "1: x", 2: "lost", 3: "3: x"}
    assert "the process that it lived in died" in found[2].text
    host.end(range(4), show=False)
    host.open(rows(4))
    assert said(host.step({0: Completion("again")})) == {0: "0: again"}
    assert [world.said for _, world in host.end([0], show=True).values()] == [["again"]], "what is shown is a copy"


def test_a_world_that_cannot_travel_is_refused():
    class Local(World):
        def reset(self, row):
            return "x"

        def step(self, completion):
            return Turn("y")

    with pytest.raises(ConfigError, match=r"the world Local cannot be sent to processes .* define it at the top"):
        ProcessHost(WorldReward(Local).world, 1.0, "Local", 1)
