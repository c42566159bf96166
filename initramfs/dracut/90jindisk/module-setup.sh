#!/bin/bash
# dracut module: the agent that attests this machine and opens its root, with all it needs.

# Asked for by the configuration beside it.
check() {
    return 255
}

depends() {
    echo kernel-modules udev-rules
}

installkernel() {
    # Whatever machine this is made on: the guest's may be another.
    hostonly='' instmods ext4 virtio_pci virtio_blk virtio_scsi sd_mod virtio_rng vmw_vsock_virtio_transport nbd \
        dm_mod dm_crypt dm_integrity authenc xts ecb aesni_intel aes_ce_blk crc32c_intel \
        configfs tsm tsm_report sev_guest tdx_guest efi_secret
}

install() {
    # shellcheck disable=SC2154 # dracut's variables
    local units=$initdir/etc/systemd/system unit
    dracut_module_included systemd || {
        dfatal "jindisk: the encrypted root is opened by a unit of systemd: have dracut include its module systemd" \
            "(look for omit_dracutmodules in /etc/dracut.conf.d), or remove the package jindisk-initramfs"
        exit 1
    }
    /usr/lib/jindisk-initramfs/collect "$initdir" || {
        dfatal "the initramfs would not open the root"
        exit 1
    }
    inst_rules 60-jindisk-root.rules
    inst_hook emergency 00 "$moddir/emergency.sh"
    inst_hook pre-pivot 90 "$moddir/running.sh"
    inst_simple "$moddir/jindisk-unlock.service" /etc/systemd/system/jindisk-unlock.service
    mkdir -p "$units/initrd-root-device.target.requires"
    ln -sf ../jindisk-unlock.service "$units/initrd-root-device.target.requires/"
    for unit in emergency rescue dracut-emergency; do
        inst_simple "$moddir/no-shell.conf" "/etc/systemd/system/$unit.service.d/jindisk.conf"
    done
}
