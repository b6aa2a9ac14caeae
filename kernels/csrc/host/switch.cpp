// The fibers' context switch on x86-64: callee-saved registers on the stack, then the other stack.
#if defined(__x86_64__)
asm(R"(
.text
.globl rwkv_shim_switch
.hidden rwkv_shim_switch
.type rwkv_shim_switch, @function
rwkv_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.section .note.GNU-stack, "", @progbits
)");
#endif
