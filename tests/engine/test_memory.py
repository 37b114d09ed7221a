"""What a process knows of its memory."""

from mdiq.engine.memory import peak_bytes, reset_peak, rss_bytes

MIB = 1 << 20


def test_the_peak_of_a_process_is_counted_anew_for_each_ring() -> None:
    large = bytearray(256 * MIB)
    large[::4096] = bytes(len(large[::4096]))  # touched
    if not reset_peak():
        assert peak_bytes() >= rss_bytes() - MIB  # the kernel does not let us: of the process's whole life
        return
    del large
    assert peak_bytes() >= 256 * MIB
    assert reset_peak() and peak_bytes() < rss_bytes() + 64 * MIB
    large = bytearray(256 * MIB)
    large[::4096] = bytes(len(large[::4096]))
    del large
    assert (peak := peak_bytes()) > rss_bytes() + 192 * MIB
    # A peak that goes on to count, until the next reset.
    assert reset_peak(peak) and peak_bytes() == peak
    assert reset_peak() and peak_bytes() < peak
