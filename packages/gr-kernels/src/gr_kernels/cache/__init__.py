"""The paged cache of users' K and V. Its maker is `gr_kernels.cache.paged.PagedCache`."""
