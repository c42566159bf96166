#!/usr/bin/python3 -I
"""Stands in QEMU's place for libvirt on a host without SEV: a real machine by emulation, whose monitor answers for SEV.

`sevhost.install` writes it out with the two paths below filled in. libvirt starts it as the emulator of a domain, or
to ask what the emulator can. It becomes QEMU itself, so that libvirt's pid, namespaces and limits are the machine's; a
child of it keeps the monitor's socket and passes all on, but for the commands of SEV, which the simulated secure
processor answers. What a real one would put into encrypted memory, the child writes into the machine's shared memory.
Standard library alone: it runs as QEMU's user, which cannot read our installation.

Source: QEMU qapi/misc-target.json (commands of SEV), docs/interop/qmp-spec.rst.
"""

import base64
import contextlib
import json
import os
import pathlib
import secrets
import select
import socket
import sys

QEMU = "@QEMU@"
KVM = "@KVM@" == "yes"
"""Whether to claim KVM as well, which the real platforms ask for; the machine is emulated all the same."""
PROCESSOR = "@PROCESSOR@"
LIMIT_BYTES = 64 << 20
TIMEOUT_S = 60.0
MEMORY = "memfd:memory-backend-memfd"
SNP_RESERVED_ONE = 1 << 17
COMMANDS = {"query-sev", "query-sev-capabilities", "query-sev-launch-measure", "sev-inject-launch-secret"}


class Processor:
    """The simulated secure processor, a line of JSON each way; one connection is one launch."""

    def __init__(self) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.settimeout(TIMEOUT_S)
        self.stream.connect(PROCESSOR)
        self._lines = self.stream.makefile("rb")

    def ask(self, **request):
        self.stream.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(self._lines.readline(LIMIT_BYTES))


class Launch:
    """What the command line says of SEV, and what is done for it."""

    def __init__(self, argv):
        self.argv = list(argv)
        self.guest = None
        self.snp = None
        self._written = False
        self.processor = None
        for number, word in enumerate(self.argv[:-1]):
            value = self.argv[number + 1]
            if word == "-object" and '"sev-guest"' in value:
                self.guest = json.loads(value)
                self.argv[number : number + 2] = [None, None]
            elif word == "-object" and '"sev-snp-guest"' in value:
                self.snp = json.loads(value)
                self.argv[number : number + 2] = [None, None]
            elif word == "-machine":
                kept = [part for part in value.split(",") if not part.startswith("confidential-guest-support=")]
                self.argv[number + 1] = ",".join(kept)
            elif KVM and word == "-accel" and value.startswith("kvm"):
                self.argv[number + 1] = "tcg"
        self.argv = [word for word in self.argv if word is not None]
        if self.guest is not None:
            # Later machines hand the kernel a random seed behind its image, which no table of hashes can have.
            place = self.argv.index("-machine") + 1
            self.argv[place] = self.argv[place].replace("pc-q35-7.2", "pc-q35-7.1")

    def value(self, option, default=""):
        """What follows an option on the command line."""
        place = self.argv.index(option) if option in self.argv else -1
        return self.argv[place + 1] if place >= 0 else default

    def start(self):
        """Tell the secure processor what is loaded; returns its refusal, or nothing."""
        if self.snp is not None and not int(self.snp.get("policy", 0)) & SNP_RESERVED_ONE:
            return "sev_snp_launch_start: SNP_LAUNCH_START ret=-5 fw_error=7 'Policy is not allowed'"
        if self.guest is None:
            return ""
        self.processor = Processor()

        def content(name):
            path = self.guest.get(name)
            if not path:
                return ""
            return pathlib.Path(path).read_text(encoding="ascii").strip()

        answer = self.processor.ask(
            do="start",
            policy=int(self.guest.get("policy", 1)),
            dh_cert=content("dh-cert-file"),
            session=content("session-file"),
            kernel_hashes=bool(self.guest.get("kernel-hashes")),
            firmware=self.value("-bios"),
            kernel=self.value("-kernel"),
            initrd=self.value("-initrd"),
            cmdline=self.value("-append"),
            vcpus=int(self.value("-smp", "1").split(",")[0]),
            cpu_model=self.value("-cpu").split(",")[0],
            memory=self.value("-m"),
        )
        if "error" in answer:
            return answer["error"]
        self._areas = answer
        return ""

    def answer(self, command, arguments, machine):
        """The monitor's answer to a command of SEV."""
        if command == "query-kvm":
            return {"return": {"enabled": True, "present": True}}
        if command == "query-sev-capabilities":
            return {"return": Processor().ask(do="capabilities")}
        if self.snp is not None:
            # As QEMU: an SNP guest's host learns no measurement, and injects nothing.
            if command == "query-sev":
                numbers = {"api-major": 1, "api-minor": 55, "build-id": 0, "snp-policy": int(self.snp["policy"])}
                return {"return": {"enabled": True, "sev-type": "sev-snp", "state": "running", **numbers}}
            return failed("SEV launch measurement is not available")
        if self.guest is None:
            if command == "query-sev":
                return {"return": {"enabled": False, "api-major": 0, "api-minor": 0, "build-id": 0, "policy": 0,
                                   "state": "uninit", "handle": 0}}  # fmt: skip
            return failed("SEV is not enabled")
        self.load(machine)
        if command == "query-sev":
            return {"return": self.processor.ask(do="query")}
        if command == "query-sev-launch-measure":
            return {"return": self.processor.ask(do="measure")}
        opened = self.processor.ask(do="inject", header=arguments["packet-header"], secret=arguments["secret"])
        if "error" in opened:
            return failed(opened["error"])
        address = arguments.get("gpa", self._areas["secret_address"])
        if not address:
            return failed("SEV: no secret area found in OVMF, gpa must be specified.")
        write(machine, address, base64.b64decode(opened["table"]))
        return {"return": {}}

    def load(self, machine):
        """Put the table of kernel hashes where the firmware looks for it."""
        if self.guest is not None and not self._written and self._areas["hashes"]:
            write(machine, self._areas["hashes_address"], base64.b64decode(self._areas["hashes"]))
        self._written = True


def failed(text):
    return {"error": {"class": "GenericError", "desc": text}}


def write(machine, address, data):
    """Into the guest's memory, below the hole under 4 GiB, where addresses are offsets."""
    for path in pathlib.Path(f"/proc/{machine}/fd").iterdir():
        with contextlib.suppress(OSError):
            if MEMORY in str(path.readlink()):
                memory = os.open(path, os.O_RDWR)
                try:
                    if os.pwrite(memory, data, address) == len(data):
                        return
                finally:
                    os.close(memory)
    raise OSError("the machine's memory was not found: it must be a shared memfd")


class Relay:
    """Between one libvirt at a time and the machine's monitor."""

    def __init__(self, listening, inner, launch, machine):
        self._listening, self._inner, self._launch, self._machine = listening, inner, launch, machine

    def run(self):
        """Until the machine ends."""
        while True:
            ready, _, _ = select.select([self._listening], [], [], 1.0)
            if ready:
                client, _ = self._listening.accept()
                with client, socket.socket(socket.AF_UNIX) as monitor:
                    monitor.connect(self._inner)
                    if not self._serve(client, monitor):
                        return
            elif os.getppid() != self._machine and not pathlib.Path(f"/proc/{self._machine}").exists():
                return

    def _serve(self, client, monitor):
        """False once the machine is gone."""
        asked = b""
        while True:
            ready, _, _ = select.select([client, monitor], [], [])
            if monitor in ready:
                data = monitor.recv(1 << 16)
                if not data:
                    return False
                client.sendall(data)
            if client in ready:
                data, descriptors, _, _ = socket.recv_fds(client, 1 << 16, 16)
                if not data:
                    return True
                asked += data
                *lines, asked = asked.split(b"\n")
                for line in lines:
                    self._one(client, monitor, line, descriptors)
                    descriptors = []
                if len(asked) > LIMIT_BYTES:
                    return True

    def _one(self, client, monitor, line, descriptors):
        try:
            call = json.loads(line)
            command = call.get("execute", "")
        except (ValueError, AttributeError):
            call, command = {}, ""
        if command in COMMANDS or (KVM and command == "query-kvm"):
            try:
                answer = self._launch.answer(command, call.get("arguments", {}), self._machine)
            except (OSError, ValueError, LookupError, TypeError) as exc:
                answer = failed(f"the simulated secure processor: {exc}")
            if "id" in call:
                answer["id"] = call["id"]
            client.sendall(json.dumps(answer).encode() + b"\r\n")
            return
        if command == "cont":
            self._launch.load(self._machine)
        socket.send_fds(monitor, [line + b"\n"], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def monitor_of(argv):
    """libvirt's monitor: its listening socket, and arguments in which `fd={}` is another's place."""
    for number, word in enumerate(argv[:-1]):
        value = argv[number + 1]
        if word == "-qmp" and value.startswith("unix:"):
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(value[5:].split(",")[0])
            listening.listen(1)
            monitor = "socket,id=jdmonitor,fd={},server=on,wait=off"
            added = ["-chardev", monitor, "-mon", "chardev=jdmonitor,mode=control"]
            return listening, [*argv[:number], *argv[number + 2 :], *added]
        if word == "-chardev" and value.startswith("socket,id=charmonitor,fd="):
            old = value.split("fd=")[1].split(",")[0]
            listening = socket.socket(fileno=int(old))
            return listening, [*argv[: number + 1], value.replace(f"fd={old}", "fd={}"), *argv[number + 2 :]]
    return None, argv


def main():
    launch = Launch(sys.argv[1:])
    listening, arguments = monitor_of(launch.argv)
    if listening is None:
        os.execv(QEMU, [QEMU, *launch.argv])
    try:
        refusal = launch.start()
    except (OSError, ValueError, LookupError) as exc:
        refusal = f"the simulated secure processor cannot be asked: {exc}"
    if refusal:
        print(f"qemu-system-x86_64: sev_launch_start: {refusal}", file=sys.stderr)
        sys.exit(1)
    name = f"\0jindisk-sev-{os.getpid()}-{secrets.token_hex(8)}"
    inner = socket.socket(socket.AF_UNIX)
    inner.bind(name)
    inner.listen(4)
    machine = os.getpid()
    if os.fork() == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(quiet, number)
        kept = {listening.fileno(), *([launch.processor.stream.fileno()] if launch.processor else [])}
        for number in range(3, 1024):
            if number not in kept:
                with contextlib.suppress(OSError):
                    os.close(number)
        Relay(listening, name, launch, machine).run()
        os._exit(0)
    os.set_inheritable(inner.fileno(), True)
    os.execv(QEMU, [QEMU, *(word.replace("fd={}", f"fd={inner.fileno()}") for word in arguments)])


if __name__ == "__main__":
    main()
