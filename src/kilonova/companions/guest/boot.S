/* The boot sector of the guest's disk: from the BIOS to 64-bit Linux in 440 bytes.
 *
 * Reads the plan that disk.py wrote behind it (sectors 1..16) to 0x8000, copies the extents named there into place,
 * asks the BIOS for its memory map, and enters vmlinux by the 64-bit boot protocol (Linux: Documentation, x86/boot).
 * The kernel lies unpacked on the disk: nothing is decompressed at boot.
 *
 *   0x08000  the plan:  extents {u32 sector, u32 sectors, u32 address}..., ended by {0, 0, entry point}
 *   0x08800             the kernel's command line
 *   0x09000             boot_params, whole but for the memory map and the cursor
 *   0x10000  page tables
 *   0x20000  where the BIOS reads to
 *
 * The bytes stand in disk.py. To make them:  as --32 boot.S -o boot.o
 *                                            ld -m elf_i386 -Ttext 0x7c00 --oformat binary boot.o -o boot.bin
 */
	.code16
	.globl _start
_start:
	cli
	xorl %eax, %eax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	sti
	cld
	movb %dl, drive

	incw %ax			/* the plan: 16 sectors from the first on */
	movw $16, %cx
	movw $0x800, %bx
	call read

	movw $0x8000, %si
extent:	movl (%si), %eax
	movl 4(%si), %ebp
	movl 8(%si), %edi
	addw $12, %si
	testl %ebp, %ebp
	jz memory
chunk:	movl $127, %ecx		/* as many as a BIOS takes at once */
	cmpl %ecx, %ebp
	jae 1f
	movl %ebp, %ecx
1:	subl %ecx, %ebp
	movw $0x2000, %bx
	call read
	addl %ecx, %eax
	shll $7, %ecx			/* sectors to words of four bytes */
	pushw %si
	pushl %eax
	cli				/* segments of 4 GiB, anew each time: the BIOS may have taken them away */
	lgdt gdtr
	movl %cr0, %edx
	incw %dx
	movl %edx, %cr0
	movw $0x18, %bx
	movw %bx, %ds
	movw %bx, %es
	decw %dx
	movl %edx, %cr0
	movl $0x20000, %esi
	addr32 rep movsl
	xorw %bx, %bx
	movw %bx, %ds
	movw %bx, %es
	sti
	popl %eax
	popw %si
	testl %ebp, %ebp
	jnz chunk
	jmp extent

memory:	movl %edi, %ebp			/* the entry point */
	movw 0x450, %ax			/* the cursor, where the BIOS left it */
	movw %ax, 0x9000
	xorl %ebx, %ebx			/* int 15h, e820: into boot_params.e820_table */
	movw $0x92d0, %di
1:	movl $0xe820, %eax
	movl $20, %ecx
	movl $0x534d4150, %edx
	int $0x15
	jc 2f
	addw $20, %di
	incb 0x91e8
	testl %ebx, %ebx
	jnz 1b

2:	cli				/* map the first GiB to itself, in pages of 2 MiB */
	movw $0x1000, %ax
	movw %ax, %es
	xorl %eax, %eax
	xorw %di, %di
	movw $0x0c00, %cx
	rep stosl
	movl $0x11003, %es:0
	movl $0x12003, %es:0x1000
	movw $0x2000, %di
	movb $0x83, %al
1:	movl %eax, %es:(%di)
	addw $8, %di
	addl $0x200000, %eax
	cmpw $0x3000, %di
	jb 1b

	movl $0x10000, %eax
	movl %eax, %cr3
	xorl %eax, %eax
	movb $0x20, %al			/* PAE */
	movl %eax, %cr4
	movl $0xc0000080, %ecx		/* EFER.LME */
	rdmsr
	orb $1, %ah
	wrmsr
	lgdt gdtr
	movl %cr0, %eax
	orl $0x80000001, %eax
	movl %eax, %cr0
	ljmp $0x10, $long

	.code64
long:	movl $0x18, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $0x9000, %esi
	movl %ebp, %eax
	jmp *%rax

	.code16
read:	pushal				/* %cx sectors from sector %eax on, to %bx:0 */
	movl %eax, dap + 8
	movw %cx, dap + 2
	movw %bx, dap + 6
	movb $0x42, %ah
	movb drive, %dl
	movw $dap, %si
	int $0x13
	popal
	jc 1f
	ret
1:	movw $sorry, %si
2:	lodsb
	movb $0xe, %ah
	movw $7, %bx
	int $0x10
	testb %al, %al
	jnz 2b
	cli
	hlt

sorry:	.asciz "disk error"
	.balign 4
gdt:					/* its first two entries are never used, so the BIOS's packet lies in them */
dap:	.word 16, 0, 0, 0
	.long 0, 0
	.quad 0x00af9a000000ffff	/* 0x10: 64-bit code */
	.quad 0x00cf92000000ffff	/* 0x18: 4 GiB of data */
gdtr:	.word gdtr - gdt - 1
	.long gdt
drive = 0x7ffc
