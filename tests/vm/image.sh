#!/usr/bin/env bash
# Makes the machine of tests/vm. tests/lab/prepare reads this file when it is called with `vm`; not to be called alone.
#
#   target/lab/vm/qemu/       QEMU with all of its libraries (tests/vm/README.md says how it is started)
#   target/lab/vm/vmlinuz     Debian's kernel for clouds
#   target/lab/vm/initrd      busybox and the kernel modules that find the disk
#   target/lab/vm/root.ext4   Debian 12 with systemd as PID 1, never written to
#
# Nothing is installed and no package's script runs: packages are unpacked, and the few things that their scripts would
# have done are done here. Neither is anything mounted.
# shellcheck disable=SC2154  # lab, rootfs, apt_dir and apt_options are tests/lab/prepare's
set -euo pipefail

vm=$lab/vm
[[ $(id -u) == 0 ]] || fail "making the VM needs root" "sudo -E tests/lab/prepare vm"

# closure DIRECTORY PACKAGE…: the packages and all that they depend on, unpacked, from bookworm alone.
closure() {
    local directory=$1 debs=$vm/debs
    shift
    apt_setup
    rm -rf "$debs" "$directory"
    mkdir -p "$debs/partial" "$directory/usr"
    # As on every Debian 12: /bin and its like are links into /usr.
    local name
    for name in bin sbin lib lib64; do
        mkdir -p "$directory/usr/$name"
        ln -s "usr/$name" "$directory/$name"
    done
    # With an empty list of installed packages apt names the whole closure, whatever this machine has.
    : >"$vm/status"
    apt-get "${apt_options[@]}" -qq -o Dir::State::status="$vm/status" -o Dir::Cache::archives="$debs" \
        -o APT::Default-Release=bookworm -o APT::Install-Recommends=0 --yes --download-only install "$@" \
        >"$vm/apt.log" 2>&1 ||
        fail "download of the VM's packages failed: $(tail -n 3 "$vm/apt.log" | tr '\n' ' ')" \
            "check the network; remove $apt_dir to read the package lists again"
    local deb
    for deb in "$debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$directory" \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*'
    done
    rm -rf "$debs" "$vm/status"
}

mkdir -p "$vm"
if [[ ! -x $vm/qemu/usr/bin/qemu-system-x86_64 ]]; then
    say "QEMU (once)"
    closure "$vm/qemu.tmp" qemu-system-x86
    rm -rf "$vm/qemu"
    mv "$vm/qemu.tmp" "$vm/qemu"
fi

# Made anew when this file or the functions of tests/lab/prepare say something else.
recipe=$({ cat "${BASH_SOURCE[0]}" && declare -f closure systemd_root; } | sha256sum)
if [[ ! -s $vm/root.ext4 || $(cat "$vm/recipe" 2>/dev/null) != "$recipe" ]]; then
    say "the root file system of the VM (once)"
    root=$vm/root
    closure "$root" linux-image-cloud-amd64 base-files base-passwd bash coreutils dash libc-bin util-linux mount \
        systemd systemd-sysv dbus kmod udev procps iproute2 iptables findutils grep sed mawk login criu gzip libseccomp2 \
        apparmor dpkg apt
    kernel=$(basename "$root"/lib/modules/*)
    mv "$root/boot/vmlinuz-$kernel" "$vm/vmlinuz"

    # Where containerd does not find it: containerd would load a profile at each start, and give it to each container.
    mv "$root/usr/sbin/apparmor_parser" "$root/usr/lib/apparmor/"

    # What base-passwd, dbus, libc-bin, kmod and iptables do when they are installed.
    cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
    cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
    printf 'messagebus:x:100:100::/nonexistent:/usr/sbin/nologin\n' >>"$root/etc/passwd"
    printf 'messagebus:x:100:\n' >>"$root/etc/group"
    chroot "$root" /usr/sbin/ldconfig
    chroot "$root" /usr/sbin/depmod "$kernel"
    for name in iptables ip6tables; do
        for tool in "" -save -restore; do
            ln -sf "$name-nft$tool" "$root/usr/sbin/$name$tool"
        done
    done
    ln -sf mawk "$root/usr/bin/awk"
    : >"$root/etc/machine-id"
    printf 'vm\n' >"$root/etc/hostname"
    printf '127.0.0.1 localhost vm\n' >"$root/etc/hosts"
    printf 'nameserver 192.0.2.53\n' >"$root/etc/resolv.conf"
    mkdir -p "$root/lab"
    ln -s /run "$root/var/run"
    # systemd-udevd stays off: one disk and one network card, whose names are known.
    for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udev-settle.service \
        systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-timesyncd.service systemd-random-seed.service \
        systemd-journal-flush.service systemd-update-utmp.service systemd-logind.service getty@.service \
        serial-getty@.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
        e2scrub_reap.service fstrim.timer systemd-firstboot.service systemd-pstore.service ldconfig.service \
        systemd-network-generator.service systemd-binfmt.service systemd-update-utmp-runlevel.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    ln -sf /usr/lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
    # /dev/vdb is what tests/vm/main.rs makes at each start: the lab, and the agent that runs the tests.
    cat >"$root/etc/systemd/system/lab.service" <<'UNIT'
[Unit]
Description=What runs the tests in this machine
# The kernel kills containers' processes here by the dozen.
StartLimitIntervalSec=0

[Service]
ExecStartPre=-/usr/bin/mount /dev/vdb /lab
ExecStartPre=-/usr/sbin/ip link set lo up
ExecStartPre=-/usr/sbin/ip address add 10.0.2.15/24 dev eth0
ExecStartPre=-/usr/sbin/ip link set eth0 up
ExecStart=/lab/vm agent
Restart=always
RestartSec=1
TimeoutStartSec=infinity
OOMPolicy=continue
OOMScoreAdjust=0
LimitNOFILE=1048576
TasksMax=infinity
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
UNIT
    ln -sf ../lab.service "$root/etc/systemd/system/multi-user.target.wants/lab.service"
    mkdir -p "$root/etc/modules-load.d"
    printf '%s\n' overlay veth bridge virtio_net >"$root/etc/modules-load.d/lab.conf"

    # The kernel has ext4 built in, but not the disk.
    initrd=$vm/initrd.d
    rm -rf "$initrd"
    mkdir -p "$initrd/bin" "$initrd/modules" "$initrd/root"
    cp "$rootfs/busybox" "$initrd/bin/busybox"
    order=$(chroot "$root" /usr/sbin/modprobe -S "$kernel" --show-depends virtio_pci &&
        chroot "$root" /usr/sbin/modprobe -S "$kernel" --show-depends virtio_blk)
    {
        printf '#!/bin/busybox sh\n/bin/busybox mkdir -p /proc /dev\n'
        printf '/bin/busybox mount -t devtmpfs dev /dev\n'
        printf '%s\n' "$order" | awk '$1 == "insmod" && !seen[$2]++ { n = split($2, part, "/");
            print "/bin/busybox insmod /modules/" part[n] }'
        printf 'until [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done\n'
        printf '/bin/busybox mount -t ext4 /dev/vda /root\n'
        printf '/bin/busybox mount --move /dev /root/dev\n'
        printf 'exec /bin/busybox switch_root /root /lib/systemd/systemd\n'
    } >"$initrd/init"
    chmod 755 "$initrd/init"
    printf '%s\n' "$order" | awk '$1 == "insmod" { print $2 }' | sort -u | while read -r module; do
        cp "$root$module" "$initrd/modules/"
    done
    (cd "$initrd" && find . | "$rootfs/busybox" cpio -o -H newc 2>/dev/null) >"$vm/initrd"

    # A file with holes: what it takes on the disk is what is in it.
    PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -O ^has_journal -d "$root" "$vm/root.ext4.tmp" 4G
    rm -rf "$root" "$initrd"
    mv "$vm/root.ext4.tmp" "$vm/root.ext4"
    printf '%s\n' "$recipe" >"$vm/recipe"
fi
