"""One page about what runs have done: `read` their files, make `series`, draw `charts`, write the `page`."""
