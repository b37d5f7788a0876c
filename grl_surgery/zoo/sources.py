"""Lists the networks of other libraries that are tried, some with arguments."""

from __future__ import annotations

from collections.abc import Sequence

from grl_surgery.loading.libraries import LIBRARIES
from grl_surgery.loading.model_zoo import available
from grl_surgery.loading.transformers_models import class_names

__all__ = ["REGISTRIES", "networks_of"]

REGISTRIES = tuple(LIBRARIES)

# Networks that ask for more than small numbers, as `load_model` takes them.
_WITH_ARGUMENTS = {
    "monai": (
        "SwinUNETR?in_channels=1&out_channels=2&feature_size=12&spatial_dims=2",
        "UNETR?in_channels=1&out_channels=2&img_size=[32,32]&spatial_dims=2&hidden_size=48&mlp_dim=96&num_heads=4",
        "ViT?in_channels=1&img_size=[32,32]&patch_size=[8,8]&hidden_size=48&mlp_dim=96&num_layers=3&num_heads=4&spatial_dims=2&classification=True",
        "ViTAutoEnc?in_channels=1&img_size=[32,32]&patch_size=[8,8]&hidden_size=48&mlp_dim=96&num_layers=3&num_heads=4&spatial_dims=2",
        "SegResNet?spatial_dims=2&init_filters=8&in_channels=1&out_channels=2",
        "SegResNetDS?spatial_dims=2&init_filters=8&in_channels=1&out_channels=2&dsdepth=2",
        "SegResNetVAE?input_image_size=[64,64]&spatial_dims=2&init_filters=8&in_channels=1&out_channels=2",
        "VNet?spatial_dims=2&in_channels=1&out_channels=2",
        "BasicUNet?spatial_dims=2&in_channels=1&out_channels=2&features=[8,8,16,16,32,8]",
        "BasicUNetPlusPlus?spatial_dims=2&in_channels=1&out_channels=2&features=[8,8,16,16,32,8]",
        "HighResNet?spatial_dims=2&in_channels=1&out_channels=2",
        "MedNeXt?spatial_dims=2&in_channels=1&out_channels=2&init_filters=8",
        "DynUNet?spatial_dims=3&in_channels=1&out_channels=2&kernel_size=[3,3,3]&strides=[1,2,2]&upsample_kernel_size=[2,2]&filters=[8,16,32]",
        "DynUNet?spatial_dims=2&in_channels=1&out_channels=2&kernel_size=[3,3,3,3]&strides=[1,2,2,2]&upsample_kernel_size=[2,2,2]&filters=[8,16,32,32]&deep_supervision=True&deep_supr_num=2",
        "EfficientNetBN?model_name=efficientnet-b0&pretrained=False&in_channels=3&num_classes=3",
        "FlexibleUNet?in_channels=3&out_channels=2&backbone=efficientnet-b0",
        "ResNet?block=basic&layers=[1,1,1,1]&block_inplanes=[8,16,32,64]&spatial_dims=2&n_input_channels=3&num_classes=3",
        "ResNet?block=bottleneck&layers=[1,1,1,1]&block_inplanes=[8,16,32,64]&spatial_dims=3&n_input_channels=1&num_classes=3",
        "SENet?spatial_dims=2&in_channels=3&block=se_resnet_bottleneck&layers=[1,1,1,1]&groups=1&reduction=16",
        "SEResNet50?spatial_dims=2&in_channels=3&num_classes=3&pretrained=False",
        "MILModel?num_classes=2&pretrained=False",
        "MILModel?num_classes=2&pretrained=False&mil_mode=att_trans",
        "VoxelMorphUNet?spatial_dims=2&in_channels=2&unet_out_channels=8&channels=[8,8,8,8]&final_conv_channels=[8]",
        "VarFullyConnectedNet?in_channels=10&out_channels=10&latent_size=4&encode_channels=[16]&decode_channels=[16]",
        "HighResBlock?spatial_dims=2&in_channels=2&out_channels=4",
    ),
    "segmentation_models_pytorch": (
        *(
            f"{decoder}?encoder_name=tu-test_resnet"
            for decoder in (
                "Unet",
                "UnetPlusPlus",
                "MAnet",
                "Linknet",
                "FPN",
                "PSPNet",
                "DeepLabV3",
                "DeepLabV3Plus",
                "PAN",
                "UPerNet",
            )
        ),
        "Unet?encoder_name=mobilenet_v2",
        "Unet?encoder_name=efficientnet-b0&decoder_attention_type=scse",
        "Unet?encoder_name=resnet18&aux_params={'classes':3}",
        "DPT?encoder_name=tu-vit_tiny_patch16_224&dynamic_img_size=True",
    ),
    "torchaudio": (
        "Conformer?input_dim=40&num_heads=4&ffn_dim=64&num_layers=3&depthwise_conv_kernel_size=7",
        "Emformer?input_dim=40&num_heads=4&ffn_dim=64&num_layers=3&segment_length=4",
        "ConvTasNet?num_sources=2&enc_num_feats=32&msk_num_feats=16&msk_num_hidden_feats=32&msk_num_layers=3&msk_num_stacks=2",
        "DeepSpeech?n_feature=40&n_hidden=32&n_class=10",
        "HDemucs?sources=['a','b']&channels=8&depth=5&nfft=1024",
        "Wav2Letter?num_classes=10&input_type=mfcc&num_features=40",
        "WaveRNN?upsample_scales=[2,2,2]&n_classes=16&hop_length=8&n_res_block=2&n_rnn=16&n_fc=16&n_hidden=16&n_output=16&n_freq=20",
        "wav2vec2_model?extractor_mode=group_norm&extractor_conv_layer_config=[(16,10,5),(16,3,2)]&extractor_conv_bias=False&encoder_embed_dim=32&encoder_projection_dropout=0.1&encoder_pos_conv_kernel=8&encoder_pos_conv_groups=2&encoder_num_layers=3&encoder_num_heads=4&encoder_attention_dropout=0.1&encoder_ff_interm_features=64&encoder_ff_interm_dropout=0.1&encoder_dropout=0.1&encoder_layer_norm_first=False&encoder_layer_drop=0.1&aux_num_out=8",
        "wavlm_model?extractor_mode=group_norm&extractor_conv_layer_config=[(16,10,5),(16,3,2)]&extractor_conv_bias=False&encoder_embed_dim=32&encoder_projection_dropout=0.1&encoder_pos_conv_kernel=8&encoder_pos_conv_groups=2&encoder_num_layers=3&encoder_num_heads=4&encoder_num_buckets=16&encoder_max_distance=32&encoder_attention_dropout=0.1&encoder_ff_interm_features=64&encoder_ff_interm_dropout=0.1&encoder_dropout=0.1&encoder_layer_norm_first=False&encoder_layer_drop=0.0&aux_num_out=8",
        "wav2vec2_model?extractor_mode=layer_norm&extractor_conv_layer_config=[(16,10,5),(16,3,2)]&extractor_conv_bias=True&encoder_embed_dim=32&encoder_projection_dropout=0.0&encoder_pos_conv_kernel=8&encoder_pos_conv_groups=2&encoder_num_layers=3&encoder_num_heads=4&encoder_attention_dropout=0.0&encoder_ff_interm_features=64&encoder_ff_interm_dropout=0.1&encoder_dropout=0.0&encoder_layer_norm_first=True&encoder_layer_drop=0.0&aux_num_out=None",
        "squim_objective_model?feat_dim=32&win_len=32&d_model=32&nhead=4&hidden_dim=32&num_blocks=2&rnn_type=LSTM&chunk_size=11",
        "Wav2Letter?num_classes=10",
        "Tacotron2?n_mels=20&encoder_embedding_dim=32&n_symbol=32",
        "hdemucs_low?sources=['a','b']",
    ),
    "speechbrain": (
        "ECAPA_TDNN.ECAPA_TDNN?input_size=40&channels=[32,32,32,32,96]&lin_neurons=16&attention_channels=16",
        "Xvector.Xvector?in_channels=40&tdnn_channels=[32,32,32,32,64]&lin_neurons=32",
        "CRDNN.CRDNN?input_shape=[2,20,40]&cnn_blocks=1&cnn_channels=[8]&rnn_layers=1&rnn_neurons=16&dnn_blocks=1&dnn_neurons=16",
        "ContextNet.ContextNet?input_shape=[2,20,40]&out_channels=[16,16,16,16]&kernel_size=3&num_blocks=2&num_layers=2&inner_dim=8&strides=[1,2]",
        "ResNet.ResNet?input_size=40&channels=[8,8,16,16]&block_sizes=[1,1,1,1]&strides=[1,1,2,2]&lin_neurons=16",
        "VanillaNN.VanillaNN?input_shape=[2,20,40]&dnn_blocks=2&dnn_neurons=16",
        "RNNLM.RNNLM?output_neurons=30&embedding_dim=16&rnn_layers=1&rnn_neurons=16&dnn_blocks=1&dnn_neurons=16",
        "Cnn14.Cnn14?mel_bins=64&emb_dim=64",
        "convolution.ConvolutionFrontEnd?input_shape=[2,20,40]&num_blocks=2&out_channels=[8,8]",
        "EnhanceResnet.EnhanceResnet?n_fft=64&win_length=64&hop_length=32&sample_rate=16000&channel_counts=[8,16]&dense_count=1&dense_nodes=16",
        "transformer.TransformerASR.TransformerASR?tgt_vocab=20&input_size=40&d_model=32&nhead=4&num_encoder_layers=2&num_decoder_layers=2&d_ffn=64",
        "transformer.TransformerLM.TransformerLM?vocab=20&d_model=32&nhead=4&num_encoder_layers=2&num_decoder_layers=0&d_ffn=64",
        "transformer.Transformer.TransformerEncoder?num_layers=2&nhead=4&d_ffn=64&d_model=40",
        "transformer.Conformer.ConformerEncoder?num_layers=2&nhead=4&d_ffn=64&d_model=40&kernel_size=7",
        "segan_model.Discriminator?kernel_size=31",
        "MetricGAN.MetricDiscriminator",
    ),
    "torch_geometric": (
        "MLP?in_channels=8&hidden_channels=16&out_channels=3&num_layers=3",
        "GCN?in_channels=8&hidden_channels=16&num_layers=2&out_channels=3&act=elu&norm=GraphNorm&jk=max",
        "PNA?in_channels=8&hidden_channels=16&num_layers=2&out_channels=3&aggregators=['mean','max']&scalers=['identity']&deg=None",
        "GCN?in_channels=8&hidden_channels=16&num_layers=3&out_channels=3&dropout=0.5&norm=BatchNorm&jk=cat",
        "GAT?in_channels=8&hidden_channels=16&num_layers=3&out_channels=3&v2=True&heads=2",
        "GIN?in_channels=8&hidden_channels=16&num_layers=3&norm=LayerNorm&jk=lstm",
        "SchNet?hidden_channels=16&num_filters=16&num_interactions=2&num_gaussians=8",
        "ViSNet?hidden_channels=16&num_layers=2&num_heads=4",
    ),
    "diffusers": (
        "UNet2DModel?sample_size=16&in_channels=3&out_channels=3&layers_per_block=1&block_out_channels=[32,64]&down_block_types=['DownBlock2D','AttnDownBlock2D']&up_block_types=['AttnUpBlock2D','UpBlock2D']",
        "UNet2DConditionModel?sample_size=16&in_channels=4&out_channels=4&layers_per_block=1&block_out_channels=[32,64]&down_block_types=['CrossAttnDownBlock2D','DownBlock2D']&up_block_types=['UpBlock2D','CrossAttnUpBlock2D']&cross_attention_dim=32&attention_head_dim=4",
        "AutoencoderKL?in_channels=3&out_channels=3&block_out_channels=[32,64]&down_block_types=['DownEncoderBlock2D','DownEncoderBlock2D']&up_block_types=['UpDecoderBlock2D','UpDecoderBlock2D']&latent_channels=4",
        "VQModel?in_channels=3&out_channels=3&block_out_channels=[32,64]&down_block_types=['DownEncoderBlock2D','DownEncoderBlock2D']&up_block_types=['UpDecoderBlock2D','UpDecoderBlock2D']&latent_channels=3",
        "AutoencoderTiny?encoder_block_out_channels=[16,16]&decoder_block_out_channels=[16,16]&num_encoder_blocks=[1,1]&num_decoder_blocks=[1,1]",
        "AsymmetricAutoencoderKL?in_channels=3&out_channels=3&down_block_out_channels=[32,64]&down_block_types=['DownEncoderBlock2D','DownEncoderBlock2D']&up_block_out_channels=[32,64]&up_block_types=['UpDecoderBlock2D','UpDecoderBlock2D']",
        "UNet1DModel?block_out_channels=[16,32]&in_channels=8&out_channels=8&down_block_types=['DownBlock1D','DownBlock1D']&up_block_types=['UpBlock1D','UpBlock1D']&extra_in_channels=0&use_timestep_embedding=False&time_embedding_type=positional",
        "DiTTransformer2DModel?num_attention_heads=4&attention_head_dim=8&in_channels=4&num_layers=2&sample_size=16&patch_size=2&num_embeds_ada_norm=10",
        "Transformer2DModel?num_attention_heads=4&attention_head_dim=8&in_channels=32&num_layers=2&norm_num_groups=8",
        "UNet3DConditionModel?in_channels=4&out_channels=4&layers_per_block=1&block_out_channels=[32,64]&down_block_types=['CrossAttnDownBlock3D','DownBlock3D']&up_block_types=['UpBlock3D','CrossAttnUpBlock3D']&cross_attention_dim=32&attention_head_dim=8",
        "PixArtTransformer2DModel?num_attention_heads=4&attention_head_dim=8&in_channels=4&out_channels=8&num_layers=2&sample_size=16&cross_attention_dim=32&caption_channels=32",
        "SD3Transformer2DModel?sample_size=16&patch_size=2&in_channels=4&out_channels=4&num_layers=2&attention_head_dim=8&num_attention_heads=4&joint_attention_dim=32&caption_projection_dim=32&pooled_projection_dim=32&pos_embed_max_size=16",
        "PriorTransformer?num_attention_heads=4&attention_head_dim=8&num_layers=2&embedding_dim=32&num_embeddings=7&additional_embeddings=4",
        "SanaTransformer2DModel?in_channels=4&out_channels=4&num_attention_heads=4&attention_head_dim=8&num_layers=2&num_cross_attention_heads=4&cross_attention_head_dim=8&cross_attention_dim=32&caption_channels=32&sample_size=16",
        "ControlNetModel?in_channels=4&block_out_channels=[32,64]&down_block_types=['CrossAttnDownBlock2D','DownBlock2D']&layers_per_block=1&cross_attention_dim=32&attention_head_dim=8",
        "T2IAdapter?channels=[32,64]&num_res_blocks=1",
    ),
    "open_clip": (),
    "ultralytics": (
        "yolov8n",
        "yolov8n-seg",
        "yolov8n-cls",
        "yolov8n-pose",
        "yolov8n-obb",
        "yolov5n",
        "yolov3-tiny",
        "yolov9t",
        "yolov10n",
        "yolo11n",
        "yolo12n",
        "yolo26n",
        "rtdetr-resnet50",
        "yolov8n-ghost",
        "yolov6n",
    ),
}
# Every name that these list is a variant of few; so many of them stand for all, evenly chosen.
_CHOSEN = {"open_clip": 16}
# So many classes for a task stand for all of transformers, beside the base class of every architecture.
_TASKS = 60
_ONLY_WITH_ARGUMENTS = ("speechbrain", "diffusers", "ultralytics", "torchaudio")


def networks_of(registry: str) -> list[str]:
    """The networks of one library that are tried, as ``load_model`` takes them.

    Of transformers these are the base class of every architecture, and some classes for each kind of task.

    Raises:
        SurgeryError: It is not installed.
    """
    given: Sequence[str] = _WITH_ARGUMENTS.get(registry, ())
    names = [f"{registry}/{name}" for name in given]
    listed = available(registry)  # type: ignore[arg-type]
    if registry in _ONLY_WITH_ARGUMENTS:
        return names
    if registry == "transformers":
        bases = [f"{registry}/{name}" for name in class_names(tasks=False)]
        return [*bases, *_evenly([name for name in listed if name not in bases], _TASKS)]
    have = {name.partition("?")[0] for name in names}
    listed = [name for name in listed if name not in have]
    return [*names, *_evenly(listed, _CHOSEN.get(registry, len(listed)))]


def _evenly(names: Sequence[str], count: int) -> Sequence[str]:
    """At most so many of them, from the first to the last at equal distances.

    Example:
        >>> _evenly("abcdefg", 3)
        'adg'
    """
    return names[:: max(1, -(-len(names) // max(count, 1)))]
