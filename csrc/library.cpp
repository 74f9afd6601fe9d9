// Table of contents of the compiled extension: every operator, its arguments, and the file that implements it.
//
// They fill tensors that the caller allocated; the public operators, with their fake and autograd formulas, are in
// softmask_fast/ops/<operator>/. Built on the LibTorch stable ABI: one binary for Python >= 3.10, torch >= 2.11.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "built_with.h"

STABLE_TORCH_LIBRARY_FRAGMENT(softmask_fast_cpp, m) {
    // cpu/word_mask.cpp
    m.def(
        "word_gradcam(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor? word_index, "
        "Tensor? key_mask, Tensor? log_sum_exp, float? soft_cap, float scale, Tensor(a!) cam) -> ()");
    m.def(
        "word_soft_mask(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor word_index, "
        "Tensor? features, int prefix_tokens, Tensor? key_mask, float scale, float constant_spread, "
        "Tensor(a!)? masked, Tensor(b!) keep) -> ()");

    // cpu/soft_masked_attention.cpp
    m.def(
        "soft_masked_attention(Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? image_index, "
        "Tensor? boundaries, Tensor? value_bias, Tensor? key_mask, float scale, Tensor(a!) output, "
        "Tensor(b!) statistics) -> ()");
    m.def(
        "soft_masked_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? keep, "
        "Tensor? image_index, Tensor? boundaries, Tensor? key_mask, Tensor statistics, float scale, "
        "Tensor(a!)? d_query, Tensor(b!)? d_key, Tensor(c!)? d_value, Tensor(d!)? d_keep_by_head) -> ()");

    // cpu/focal_itc.cpp
    m.def(
        "focal_itc_sums(Tensor(a!) products, Tensor(b!)? teacher, Tensor(c!)? transposed, float inverse_temperature, "
        "int first_row, int first_key, int key_offset, Tensor? columns, Tensor? first, Tensor? count, int row_offset, "
        "bool start, int order, bool sample, int first_negative, int last_negative, int seed, int direction, "
        "Tensor(d!) sums, Tensor(e!) places) -> ()");
    m.def(
        "focal_itc_terms(Tensor products, Tensor(a!)? teacher, Tensor(b!)? transposed, float inverse_temperature, "
        "int first_row, int first_key, int key_offset, Tensor? columns, Tensor? first, Tensor? count, int row_offset, "
        "float gamma, Tensor(c!) sums, Tensor places) -> ()");
    m.def(
        "focal_itc_finish(Tensor sums, Tensor places, Tensor? count, float inverse_temperature, float gamma, "
        "int order, float alpha, bool any_positive, bool stats, Tensor(a!) loss, Tensor(b!) row_state, "
        "Tensor(c!) dominant, Tensor(d!) statistics, Tensor(e!) hard_negative) -> ()");

    // cpu/focal_itc_gradient.cpp
    m.def(
        "focal_itc_gradient(Tensor(a!) products, Tensor? teacher, Tensor(b!)? transposed, float inverse_temperature, "
        "int first_row, int first_key, int key_offset, Tensor? columns, Tensor? first, Tensor? count, int row_offset, "
        "float gamma, int order, float alpha, bool any_positive, Tensor grad_loss, Tensor row_state, Tensor dominant, "
        "Tensor(c!) of_inverse) -> ()");

    // cpu/focal_itc_tile.cpp
    m.def(
        "focal_itc_tile(Tensor(a!) products, float inverse_temperature, Tensor? columns, Tensor? first, Tensor? count, "
        "int row_offset, float gamma, int order, bool any_positive, bool sample, int first_negative, "
        "int last_negative, int seed, float scale, Tensor(b!) loss, Tensor(c!)? grad_temperature, "
        "Tensor(d!) statistics, Tensor(e!) hard_negative) -> ()");

    // cpu/focal_itc_sigmoid.cpp
    m.def(
        "focal_itc_sigmoid(Tensor(a!) products, float inverse_temperature, float bias, int first_row, int first_key, "
        "int key_offset, Tensor? columns, Tensor? first, Tensor? count, int row_offset, float gamma, int order, "
        "Tensor(b!) losses) -> ()");
    m.def(
        "focal_itc_sigmoid_gradient(Tensor(a!) products, float inverse_temperature, float bias, int first_row, "
        "int first_key, int key_offset, Tensor? columns, Tensor? first, Tensor? count, int row_offset, float gamma, "
        "int order, Tensor grad_loss, Tensor(b!) totals) -> ()");
}

// The file is also an empty Python module, because that is what setuptools builds and puts in place.
PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
