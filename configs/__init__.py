"""One flat YAML per recipe. Data only; a package so that installed copies are found."""
