#!/bin/busybox sh
# PID 1 of the boot guest: says that userland is up, then runs the command that the kernel command line names
# (kata.run="…" or kata.run.base64=…), or powers off at once (kata.poweroff), or else gives a shell on the console.
echo 'kata-lab: userland is up'

# busybox finds its own commands through /proc/self/exe, once there is a /proc.
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=vt100 PS1='kata-lab:\w# '

read -r line </proc/cmdline
command=
mode=shell
case " $line " in
*' kata.run.base64='*)
    mode=run
    command=${line#*kata.run.base64=}
    command=$(echo "${command%% *}" | base64 -d)
    ;;
*' kata.run="'*)
    mode=run
    command=${line#*kata.run=\"}
    command=${command%%\"*}
    ;;
*' kata.run='*)
    mode=run
    command=${line#*kata.run=}
    command=${command%% *}
    ;;
*' kata.poweroff '*) mode=poweroff ;;
esac

status=0
if [ $mode != poweroff ]; then
    /bin/busybox --install -s /bin
    hostname kata-lab
    cd /root
    # A controlling terminal makes Ctrl-C and job control work; /dev/console cannot be one, cttyhack finds the tty behind it.
    if [ $mode = run ]; then
        setsid cttyhack sh -c "$command"
    else
        setsid cttyhack sh
    fi
    status=$?
    # Restores the terminal for the lines below.
    stty sane
fi
echo "kata-lab: exit status $status"
# Setting the terminal waits until what was written has left the UART; powering off does not.
stty sane
poweroff -f
