/* The last 64 KiB of the emulated machine's ROM: copies the program, which fills the ROM below, to memory, enters
 * 64-bit mode with AVX-512 enabled, and calls the program. Memory's first GiB is seen at address 0 and again at 64 GiB,
 * where the arena is. */
#define ROM 0xF0000
#define PROGRAM_IN_ROM 0xFFF00000
#define PROGRAM_BYTES 0xF0000
#define TOP_TABLE 0x1000 /* 512 GiB an entry */
#define GIGABYTES 0x2000 /* 1 GiB an entry */
#define PROGRAM 0x100000
#define STACK 0x80000

    .code16
reset:
    lgdtl %cs:descriptors - ROM
    mov $1, %eax /* protection */
    mov %eax, %cr0
    ljmpl $8, $protected

    .code32
protected:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $PROGRAM_IN_ROM, %esi
    mov $PROGRAM, %edi
    mov $PROGRAM_BYTES, %ecx
    rep movsb
    movl $GIGABYTES + 3, TOP_TABLE /* present, writable */
    movl $0x83, GIGABYTES          /* the same, a page by itself */
    movl $0x83, GIGABYTES + 64 * 8
    mov $TOP_TABLE, %eax
    mov %eax, %cr3
    mov $0x40620, %eax /* physical address extension, SSE, its exceptions, XSAVE */
    mov %eax, %cr4
    mov $0xC0000080, %ecx /* EFER: long mode */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000033, %eax /* paging, protection, x87 and SSE without traps */
    mov %eax, %cr0
    xor %ecx, %ecx
    xor %edx, %edx
    mov $0xE7, %eax /* XCR0: x87, SSE, AVX, masks, ZMM 0 to 15, ZMM 16 to 31 */
    xsetbv
    ljmp $24, $long_mode

    .code64
long_mode:
    mov $STACK, %esp
    mov $PROGRAM, %eax
    call *%rax
stop:
    hlt
    jmp stop

    .balign 8
table: /* none, 32-bit code, data, 64-bit code */
    .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF
descriptors:
    .word descriptors - table - 1
    .long table

    .code16
    .org 0xFFF0 /* where an x86 CPU begins */
    jmp reset
    .org 0x10000
