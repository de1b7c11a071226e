"""What a container needs of host and guest: root file systems, volumes, and how large its sandbox is."""
