#!/usr/bin/env bash
# Makes the machine of tests/vm. tests/lab/prepare reads this file when it is called with `vm`; not to be called alone.
#
#   target/lab/vm/arch        what the machine is, in Debian's words: amd64 or arm64 (LAB_ARCH)
#   target/lab/vm/qemu/       QEMU with all of its libraries (tests/vm/README.md says how it is started)
#   target/lab/vm/vmlinuz     Debian's kernel for clouds
#   target/lab/vm/initrd      busybox and the kernel modules that find the disk
#   target/lab/vm/root.ext4   Debian 12 with systemd as PID 1, never written to
#
# Nothing is installed and no package's script runs: packages are unpacked, and the few things that their scripts would
# have done are done here. Neither is anything mounted.
# shellcheck disable=SC2154  # lab, rootfs, arch and here are tests/lab/prepare's
set -euo pipefail

vm=$lab/vm
[[ $(id -u) == 0 ]] || fail "making the VM needs root" "sudo -E tests/lab/prepare vm"

mkdir -p "$vm"
case $arch in
    amd64) emulator=x86 program=qemu-system-x86_64 ;;
    arm64) emulator=arm program=qemu-system-aarch64 ;;
esac
if [[ ! -x $vm/qemu/usr/bin/$program ]]; then
    say "QEMU (once)"
    closure "$here" "$vm/qemu.tmp" "qemu-system-$emulator"
    rm -rf "$vm/qemu"
    mv "$vm/qemu.tmp" "$vm/qemu"
fi

# Made anew when this file or the functions of tests/lab/prepare say something else.
recipe=$({ cat "${BASH_SOURCE[0]}" && declare -f closure systemd_root; } | sha256sum)
if [[ ! -s $vm/root.ext4 || $(cat "$vm/recipe" 2>/dev/null) != "$recipe" ]]; then
    say "the root file system of the VM (once)"
    root=$vm/root
    systemd_root "$root" "linux-image-cloud-$arch" kmod udev login criu gzip apparmor dpkg apt
    kernel=$(basename "$root"/lib/modules/*)
    mv "$root/boot/vmlinuz-$kernel" "$vm/vmlinuz"

    # Where containerd does not find it: containerd would load a profile at each start, and give it to each container.
    mv "$root/usr/sbin/apparmor_parser" "$root/usr/lib/apparmor/"

    # What kmod and iptables do when they are installed.
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$root" "$kernel"
    for name in iptables ip6tables; do
        for tool in "" -save -restore; do
            ln -sf "$name-nft$tool" "$root/usr/sbin/$name$tool"
        done
    done
    printf 'vm\n' >"$root/etc/hostname"
    printf '127.0.0.1 localhost vm\n' >"$root/etc/hosts"
    printf 'nameserver 192.0.2.53\n' >"$root/etc/resolv.conf"
    mkdir -p "$root/lab"
    # systemd-udevd stays off: one disk and one network card, whose names are known.
    for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udev-settle.service \
        systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-timesyncd.service systemd-random-seed.service \
        systemd-journal-flush.service systemd-update-utmp.service systemd-logind.service getty@.service \
        serial-getty@.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
        e2scrub_reap.service fstrim.timer systemd-firstboot.service systemd-pstore.service ldconfig.service \
        systemd-network-generator.service systemd-binfmt.service systemd-update-utmp-runlevel.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
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
TTYPath=/dev/console
UNIT
    ln -sf ../lab.service "$root/etc/systemd/system/multi-user.target.wants/lab.service"
    mkdir -p "$root/etc/modules-load.d"
    printf '%s\n' overlay veth bridge virtio_net >"$root/etc/modules-load.d/lab.conf"

    # The modules of the disk and of its file system, unless the kernel has them built in.
    initrd=$vm/initrd.d
    rm -rf "$initrd"
    mkdir -p "$initrd/bin" "$initrd/modules" "$initrd/root"
    cp "$rootfs/busybox" "$initrd/bin/busybox"
    order=$(for module in virtio_pci virtio_blk ext4; do
        PATH=$PATH:/usr/sbin:/sbin modprobe -d "$root" -S "$kernel" --show-depends "$module" || exit
    done)
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
        cp "$module" "$initrd/modules/"
    done
    packer=$rootfs/busybox
    if ! native; then
        unpack bookworm "busybox-static:$here" "$lab/tools"
        packer=$lab/tools/bin/busybox
    fi
    (cd "$initrd" && find . | "$packer" cpio -o -H newc 2>/dev/null) >"$vm/initrd"

    # A file with holes: what it takes on the disk is what is in it.
    PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -O ^has_journal -d "$root" "$vm/root.ext4.tmp" 4G
    rm -rf "$root" "$initrd"
    mv "$vm/root.ext4.tmp" "$vm/root.ext4"
    printf '%s\n' "$arch" >"$vm/arch"
    printf '%s\n' "$recipe" >"$vm/recipe"
fi
