"""Two hosts, node1 and node2, with ssh and pdsh between them: this machine under other names.

All of it is in namespaces of its own: Debian's packages lie over /usr, the user has another home, and what
was started ends with the command. Nothing is installed, and nothing of this machine is changed.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.packages import SSH, UnavailableError, unpacked
from tests.ports import reserve_port

NODES = ("node1", "node2")
IN_NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
WORLD = """\
set -e
home=$1 packages=$2 port=$3
shift 3
mount -t overlay overlay -o "lowerdir=$packages/usr:/usr" /usr
mount --bind "$home/passwd" /etc/passwd
mount --bind "$home/hosts" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
for key in id_ed25519 host; do ssh-keygen -q -t ed25519 -N '' -f "$home/.ssh/$key"; done
cp "$home/.ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
/usr/sbin/sshd -f /dev/null -p "$port" -h "$home/.ssh/host" -o PidFile=none -o PasswordAuthentication=no \\
    -o ListenAddress=127.0.0.1 -o PermitRootLogin=yes -o StrictModes=no
export HOME=$home
cd "$home"
exec "$@"
"""
SSH_CONFIG = """\
Host node1 node2
    Port {port}
    StrictHostKeyChecking no
    LogLevel ERROR
"""


def on_nodes(folder: Path, cache: Path, *command: str) -> list[str]:
    """A command that runs another one on a host from which node1 and node2 are reached without a password.

    folder: receives the user's home, which is also the current folder.

    Raises UnavailableError where there are no namespaces or packages.
    """
    if os.getuid() != 0 or not shutil.which("unshare"):
        raise UnavailableError("an ssh server for tests needs root, and unshare")
    packages = unpacked(SSH, cache)
    overlay = ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={packages}/usr:/usr", "/usr"]
    tried = subprocess.run([*IN_NAMESPACES, *overlay], capture_output=True, text=True)
    if tried.returncode:
        raise UnavailableError(f"no namespace with files of its own: {tried.stderr.strip()}")
    port, home = reserve_port(), folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".ssh" / "config").write_text(SSH_CONFIG.format(port=port))
    (home / "passwd").write_text(passwd_with(home))
    (home / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
    (folder / "world.sh").write_text(WORLD)
    world = ["bash", str(folder / "world.sh"), str(home), str(packages), str(port)]
    return [*IN_NAMESPACES, *world, *command]


def passwd_with(home: Path) -> str:
    """This machine's users, root in another home, and the one that sshd wants."""
    lines = Path("/etc/passwd").read_text().splitlines()
    others = [line for line in lines if not line.startswith(("root:", "sshd:"))]
    users = [f"root:x:0:0:root:{home}:/bin/bash", "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin", *others]
    return "\n".join(users) + "\n"
