"""A guest of 512 bytes: it reads its whole disk through the BIOS and says on the serial port what it read.

It prints a dot each timer tick until it gets a byte on COM1; then it makes one *pass*: it reads all blocks of 32 KiB
in a scattered order, hashes them, writes one sector of the disk's tail (a copy-on-write into an overlay) and prints
`P<pass> S<hash>`, both as eight hex digits. A disk error prints `E<status>` and stops it. The hash depends on each
byte and on its place, so a wrong byte shows.
"""

import math
import random
import struct
from dataclasses import dataclass, field

SECTOR_BYTES = 512
BLOCK_SECTORS = 64
BLOCK_BYTES = BLOCK_SECTORS * SECTOR_BYTES
HASH_FACTOR = 0x01000193

_PACKET_AT = 0x114
_PARAMETERS_AT = 0x1A0
_PARTITIONS_AT = 0x1BE

# Offsets are from 0x7c00, where the BIOS loads and starts it: bytes ; what they do.
_LISTING = """
    fa 31c0 8ed8 8ed0 bc007c fb fc ; cli; ds = ss = 0; sp = 0x7c00; sti; cld
    8816107d                       ; mov [drive], dl
    b02e                           ; 010 wait: mov al, '.'
    e8e900                         ; call put
    f4                             ; hlt (until the next timer tick)
    bafd03 ec a801                 ; in al, COM1 line status; test al, 1
    74f2                           ; jz wait
    baf803 ec                      ; in al, COM1 data
    66ff06087d                     ; inc dword [pass]
    6631ff                         ; xor edi, edi (the hash)
    66893e0c7d                     ; mov [block], edi
    668b2ea07d                     ; mov ebp, [blocks]
    c706167d4000                   ; mov word [packet.count], 64
    66a10c7d                       ; 03a read: mov eax, [block]
    66c1e006                       ; shl eax, 6
    bb0042                         ; mov bx, 0x4200 (extended read)
    e86a00                         ; call disk
    b90020 31db                    ; mov cx, 8192; xor bx, bx
    6669ff93010001                 ; 04d hash: imul edi, edi, 0x01000193
    2666033f                       ; add edi, es:[bx]
    83c304                         ; add bx, 4
    e2f0                           ; loop hash
    66a10c7d                       ; mov eax, [block]
    660306a47d                     ; add eax, [step]
    663b06a07d                     ; cmp eax, [blocks]
    7205                           ; jb +5
    662b06a07d                     ; sub eax, [blocks]
    66a30c7d                       ; mov [block], eax
    664d                           ; dec ebp
    75c0                           ; jnz read
    66a1087d 2666a30000            ; mov eax, [pass]; mov es:[0], eax
    c706167d0100                   ; mov word [packet.count], 1
    66a1a87d                       ; mov eax, [written]
    bb0043                         ; mov bx, 0x4300 (extended write)
    e81f00                         ; call disk
    b050 668b16087d e84500         ; al = 'P'; edx = [pass]; call line
    b020 e85c00                    ; al = ' '; call put
    6689fa b053 e83800             ; edx = edi; al = 'S'; call line
    b00a e84f00                    ; al = newline; call put
    e95eff                         ; jmp wait
    66a31c7d                       ; 0b2 disk: mov [packet.lba], eax
    6657 6655                      ; push edi; push ebp
    89d8 be147d 8a16107d           ; ax = bx; si = packet; dl = [drive]
    cd13                           ; int 0x13
    665d 665f                      ; pop ebp; pop edi
    bb0010 8ec3                    ; es = 0x1000 (the buffer)
    7201                           ; jc failed
    c3                             ; ret
    660fb6d4 b045 e80800           ; 0d1 failed: edx = ah; al = 'E'; call line
    b00a e81f00                    ; al = newline; call put
    f4 ebfd                        ; halt: hlt; jmp halt
    e81900                         ; 0e2 line: call put (al, then edx in hex)
    b90800                         ; mov cx, 8
    66c1c204                       ; 0e8 digit: rol edx, 4
    88d0 240f 0430                 ; al = dl & 15 + '0'
    3c39 7602 0427                 ; if al > '9': al += 39
    e80300                         ; call put
    e2eb c3                        ; loop digit; ret
    52 baf803 ee 5a c3             ; 0fe put: out COM1 data, al
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootableImage:
    """A raw disk that boots this guest.

    Attributes:
        content: The image, whole.
        pass_hash: What each pass prints.
        written_sector: The sector that each pass overwrites, not among those it reads.
    """

    content: bytes = field(repr=False)
    pass_hash: int
    written_sector: int

    def after_pass(self, pass_number: int) -> bytes:
        """The disk as the guest sees it after that pass."""
        blocks, step = _blocks_and_step(len(self.content))
        last_block = (blocks - 1) * step % blocks
        sector = bytearray(self.content[last_block * BLOCK_BYTES :][:SECTOR_BYTES])
        sector[:4] = struct.pack("<I", pass_number)
        disk = bytearray(self.content)
        offset = self.written_sector * SECTOR_BYTES
        disk[offset : offset + SECTOR_BYTES] = sector
        return bytes(disk)


def bootable_image(size_bytes: int, seed: int) -> BootableImage:
    """A bootable disk of exactly `size_bytes` (>= 65 KiB, any number); random bytes by `seed` but for the boot."""
    blocks, step = _blocks_and_step(size_bytes)
    content = _boot_sector(blocks, step) + random.Random(seed).randbytes(size_bytes - SECTOR_BYTES)
    return BootableImage(
        content=content, pass_hash=_hash(content, blocks, step), written_sector=_written_sector(blocks)
    )


def _boot_sector(blocks: int, step: int) -> bytes:
    sector = bytearray(SECTOR_BYTES)
    code = bytes.fromhex("".join(line.partition(";")[0] for line in _LISTING.splitlines()))
    sector[: len(code)] = code
    struct.pack_into("<BBHHHII", sector, _PACKET_AT, 16, 0, BLOCK_SECTORS, 0, 0x1000, 0, 0)
    struct.pack_into("<III", sector, _PARAMETERS_AT, blocks, step, _written_sector(blocks))
    # One active partition: nova's format inspector takes a boot signature without any for a forged GPT.
    struct.pack_into("<B3xB3xII", sector, _PARTITIONS_AT, 0x80, 0x83, 1, blocks * BLOCK_SECTORS - 1)
    sector[-2:] = b"\x55\xaa"
    return bytes(sector)


def _blocks_and_step(size_bytes: int) -> tuple[int, int]:
    blocks = (size_bytes // SECTOR_BYTES - 2) // BLOCK_SECTORS  # two sectors at least stay for the tail
    if blocks < 2:
        raise ValueError(f"no room for two blocks and a tail in {size_bytes} bytes")
    step = max(1, round(blocks * 0.618))
    while math.gcd(step, blocks) > 1:
        step -= 1
    return blocks, step


def _written_sector(blocks: int) -> int:
    return blocks * BLOCK_SECTORS + 1


def _hash(content: bytes, blocks: int, step: int) -> int:
    value = 0
    words = memoryview(content)[: blocks * BLOCK_BYTES].cast("I")
    words_per_block = BLOCK_BYTES // 4
    for index in range(blocks):
        start = index * step % blocks * words_per_block
        for word in words[start : start + words_per_block]:
            value = (value * HASH_FACTOR + word) & 0xFFFFFFFF
    return value
