"""QEMU/KVM through libvirt: see `driver.py`. libvirt's Python module is looked for only when a driver is made."""
