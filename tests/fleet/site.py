"""Machines of a fleet on one wire: a network namespace each, tied to a switch in another.

What listens on this machine's loopback (broker, APIs) is reached by them at `HERE`; the machine's own network stays as
it is.  A machine can be cut off, as by a pulled plug: nothing answers any longer, and nobody is told so.
"""

import os
import subprocess

from kilonova.companions.wires.forward import Forward
from kilonova.companions.wires.ground import Ground
from tests.real import Machine

HERE = "192.0.2.1"


class Site:
    def __init__(self, ground: Ground, names: list[str], ports: list[int]) -> None:
        self.ground, self.tag = ground, f"kn{os.getpid() % 1_000_000}"
        self.switch = Machine(f"{self.tag}-site")
        self.machines = {name: Machine(f"{self.tag}-{name}") for name in names}
        self._in_switch("link add wire type bridge")
        self._in_switch(f"address add {HERE}/24 dev wire")
        self._in_switch("link set wire up")
        for i, (name, machine) in enumerate(self.machines.items()):
            self._in_switch(f"link add {name} type veth peer name eth0 netns {machine.name}")
            self._in_switch(f"link set {name} master wire up")
            ground.run(["ip", "address", "add", f"{self.address(i)}/24", "dev", "eth0"], machine.name)
            ground.run(["ip", "link", "set", "eth0", "up"], machine.name)
        self.relays = [
            Forward(ground.listener(HERE, port, self.switch.name), "127.0.0.1", port, connections=256) for port in ports
        ]

    def _in_switch(self, words: str) -> None:
        subprocess.run(["ip", "-n", self.switch.name, *words.split()], check=True)

    @staticmethod
    def address(i: int) -> str:
        return f"192.0.2.{10 + i}"

    def cut(self, name: str) -> None:
        self._in_switch(f"link set {name} down")

    def heal(self, name: str) -> None:
        self._in_switch(f"link set {name} up")

    def close(self) -> None:
        for relay in self.relays:
            relay.close()
        for machine in (*self.machines.values(), self.switch):
            machine.close()
